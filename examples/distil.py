"""Distil one model of transformers into another on a file of trajectories.

    python examples/distil.py STUDENT TEACHER trajectories.jsonl runs/student

The same as `sadkern train`, in Python, for when you want to change it. A line of the file is an
object with the agent's transcript as "text".
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sadkern.evaluate import compare
from sadkern.train import SADConfig, SADTrainer, load_trajectories, prepare

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
parser.add_argument("student", help="a folder or a hub's name")
parser.add_argument("teacher", help="the same, with the same tokenizer")
parser.add_argument("trajectories", help="a JSON Lines file")
parser.add_argument("output_dir", help="where the distilled student goes")
parser.add_argument("--epochs", type=float, default=3)
parser.add_argument("--batch-size", type=int, default=8)
parser.add_argument("--learning-rate", type=float, default=2e-5)
options = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(options.student)
student = AutoModelForCausalLM.from_pretrained(options.student, dtype=torch.float32)
teacher = AutoModelForCausalLM.from_pretrained(options.teacher, dtype="auto")

# Every tenth trajectory is held out: what a student knows by heart says nothing.
records = load_trajectories(options.trajectories)
held_out = prepare(records[::10], tokenizer, max_length=512)
training = prepare([r for i, r in enumerate(records) if i % 10], tokenizer, max_length=512)

args = SADConfig(
    output_dir=options.output_dir,
    divergence="forward_kl",
    reason_weight=1.0,
    act_weight=1.0,
    num_train_epochs=options.epochs,
    per_device_train_batch_size=options.batch_size,
    learning_rate=options.learning_rate,
    report_to="none",
)
trainer = SADTrainer(
    model=student,
    teacher_model=teacher,
    args=args,
    train_dataset=training,
    processing_class=tokenizer,
)
before = compare(student, teacher, held_out)
trainer.train()
trainer.save_model()
after = compare(student, teacher, held_out)

for name in ("reason_kl", "act_kl", "cot_match", "action_accuracy"):
    print(f"{name:16} {getattr(before, name):8.3f} -> {getattr(after, name):8.3f}")
