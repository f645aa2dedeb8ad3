"""Several processes give the gradient of one, whatever wraps the model."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from signal import SIGTERM

import pytest
import torch
from small_models import small_model
from small_trainers import assert_same, plainly, trainer_for

from sadkern.train.script import last_checkpoint

START = """
import os, sys, torch
from pathlib import Path
from transformers import LlamaForCausalLM
sys.path.insert(0, sys.argv[1])
from small_trainers import trainer_for
here, rank = Path(__file__).parent, int(os.environ["RANK"])
student, teacher = (LlamaForCausalLM.from_pretrained(here / s) for s in ("student", "teacher"))
examples = torch.load(here / "examples.pt")
"""
ENDED = """
accelerator = trainer.accelerator
del trainer  # and end the threads between the two, which may abort the exit
accelerator.free_memory()
accelerator.end_training()
"""
TRAINER = (
    """
trainer = trainer_for(
    here, student, teacher, examples, per_device_train_batch_size=2, gradient_accumulation_steps=2,
    per_device_eval_batch_size=2, eval_dataset=examples[:5], **SETTINGS,
)
metrics = trainer.evaluate()
trainer.train()
if not rank:
    found = {k.removeprefix("module."): g for k, g in trainer.gradients.steps[0].items()}
    hard = [example.get("difficulty") for example in trainer.train_dataset]
    torch.save((found, trainer.state.log_history[0], (hard, metrics)), here / "found.pt")
"""
    + ENDED
)
BY_HAND = """
def WRAP():
    for module in (*student.model.layers, student.lm_head, student):
        fully_shard(module, mesh=mesh)
"""
BY_ACCELERATE = """
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from sadkern.plan.sharded import known_of
from sadkern.train.setup import shard_teacher
def WRAP():
    known = known_of(mesh)
    fsdp2_prepare_model(known, student)
    shard_teacher(teacher, known)
    shares = {name for name, x in teacher.model.named_parameters() if isinstance(x, DTensor)}
    assert shares == {name for name, _ in teacher.model.named_parameters()} - {"lm_head.weight"}
"""
# The Trainer does so on accelerators alone.
SHARDED = """
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from sadkern import span_kl
from sadkern.forward import head_projection, supervised_loss
from sadkern.teacher import OnlineTeacher
from sadkern.train import SpanCollator
dist.init_process_group("gloo")
mesh = dist.init_device_mesh("cpu", (2,), mesh_dim_names=("ranks",))
projection, teacher = head_projection(student), OnlineTeacher(teacher)
WRAP()
spans = SpanCollator(0)(examples)["span_ids"]
batch = SpanCollator(0)(examples[rank::2])
rows, inputs = batch["rows"], {name: batch[name] for name in ("input_ids", "attention_mask")}
signal, kinds = teacher(rows, **inputs), batch["span_ids"].flatten()[rows]
counts = [(spans == kind).sum() / 2 for kind in (1, 2)]
loss = supervised_loss(
    student, rows, lambda own: span_kl(own, signal, kinds, num_tokens=counts).loss, projection,
    **inputs,
)
loss.backward()
found = {name: p.grad.full_tensor() for name, p in student.named_parameters()}
if not rank:
    torch.save((found, {}, None), here / "found.pt")
dist.destroy_process_group()
"""
EASY_FIRST = {"padding_free": True, "curriculum": "linear"}
SIGNALLED = (
    """
import signal
from transformers import TrainerCallback
class Signal(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if rank and state.global_step == 3:
            signal.raise_signal(signal.SIGTERM)
trainer = trainer_for(
    here, student, teacher, examples, per_device_train_batch_size=2, max_steps=40,
)
trainer.add_callback(Signal())
trainer.train()
torch.save((trainer.state.global_step, trainer.stop.received), here / f"stopped{rank}.pt")
"""
    + ENDED
)
KILLED = """
import signal
from transformers import TrainerCallback
trainer = trainer_for(
    here, student, teacher, examples, per_device_train_batch_size=2, max_steps=7, save_steps=2,
    save_strategy="steps", optim="sgd", learning_rate=0.3, curriculum="linear",
)
compute = trainer.compute_loss
def killed(*arguments, **named):
    if rank and trainer.state.global_step == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return compute(*arguments, **named)
trainer.compute_loss = killed
trainer.train()
"""
WRAPPED = {
    "ddp": "SETTINGS = {}" + TRAINER,
    "ddp, packed, easy ones first": f"SETTINGS = {EASY_FIRST}" + TRAINER,
    "fsdp": BY_HAND + SHARDED,
    "fsdp by accelerate, the teacher too": BY_ACCELERATE + SHARDED,
}


@pytest.mark.parametrize("wrapped", WRAPPED)
def test_two_processes_give_the_gradient_of_one(tmp_path, examples, wrapped):
    student, teacher = small_model(0), small_model(1)
    _, gradient, logged = plainly(student, teacher, examples)
    run(tmp_path, WRAPPED[wrapped], student, teacher, examples)
    found, entry, more = torch.load(tmp_path / "found.pt")
    assert_same(found, gradient)
    if not entry:
        return
    assert {key: entry[key] for key in logged} == pytest.approx(logged, rel=1e-5)
    settings = EASY_FIRST if "easy" in wrapped else {}
    alone = trainer_for(
        tmp_path, student, teacher, examples, eval_dataset=examples[:5], **settings
    )  # fmt: skip
    hard, metrics = more
    if settings:
        expected = [example["difficulty"] for example in alone.train_dataset]
        assert hard == pytest.approx(expected, rel=1e-4)
    # Five trajectories are no multiple of what both take at a time.
    measured = {k: x for k, x in alone.evaluate().items() if re.search("loss|/|entropy|tail", k)}
    assert {key: metrics[key] for key in measured} == pytest.approx(measured, rel=1e-4)


def run(tmp_path, source, student, teacher, examples, ends=True):
    """Twice at once. What was said, where it does not end well."""
    student.save_pretrained(tmp_path / "student")
    teacher.save_pretrained(tmp_path / "teacher")
    torch.save(examples, tmp_path / "examples.pt")
    script = tmp_path / "rank.py"
    script.write_text(START + source)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*command, str(script), str(Path(__file__).parent)],
        capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert (done.returncode == 0) == ends, done.stderr[-3000:]
    return done.stderr


def test_a_signal_to_one_process_stops_all_after_one_step(tmp_path, examples):
    run(tmp_path, SIGNALLED, small_model(0), small_model(1), examples)
    # It came in the fourth step, which began before: the fifth is the first that all knew of.
    assert [torch.load(tmp_path / f"stopped{rank}.pt") for rank in (0, 1)] == [(5, SIGTERM)] * 2
    assert Path(last_checkpoint(tmp_path / "out")).name == "checkpoint-5"


def test_a_killed_process_ends_the_run_which_fewer_can_go_on_with(tmp_path, examples):
    """Killed in a step's middle it is named, and the last checkpoint is whole: one process that
    takes as many trajectories a step comes to what it would have come to alone."""
    said = run(tmp_path, KILLED, small_model(0), small_model(1), examples, ends=False)
    assert re.search(r"rank +: 1 ", said)
    assert "Signal 9 (SIGKILL)" in said
    left = last_checkpoint(tmp_path / "out")
    assert Path(left).name == "checkpoint-2"

    def ended(folder, resume):
        trainer = trainer_for(
            folder, small_model(5 if resume else 0), small_model(1), examples, max_steps=7,
            per_device_train_batch_size=2, gradient_accumulation_steps=2, save_strategy="no",
            optim="sgd", learning_rate=0.3, curriculum="linear",
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        return trainer.model.state_dict()

    alone = ended(tmp_path / "alone", None)
    for name, weight in ended(tmp_path, left).items():
        torch.testing.assert_close(weight, alone[name], rtol=1e-5, atol=1e-6, msg=name)
    moved = (alone["lm_head.weight"] - small_model(0).lm_head.weight).abs().max()
    assert moved > 1e-2
