"""Several processes give the gradient of one, whatever wraps the model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_models import small_model
from test_train import assert_same, plainly, trainer_for

START = """
import os, sys, torch
from pathlib import Path
from transformers import LlamaForCausalLM
sys.path.insert(0, sys.argv[1])
from test_train import trainer_for
here, rank = Path(__file__).parent, int(os.environ["RANK"])
student, teacher = (LlamaForCausalLM.from_pretrained(here / s) for s in ("student", "teacher"))
examples = torch.load(here / "examples.pt")
"""
TRAINER = """
trainer = trainer_for(
    here, student, teacher, examples, per_device_train_batch_size=2, gradient_accumulation_steps=2,
    **SETTINGS,
)
trainer.train()
if not rank:
    found = {k.removeprefix("module."): g for k, g in trainer.gradients.steps[0].items()}
    hard = [example.get("difficulty") for example in trainer.train_dataset]
    torch.save((found, trainer.state.log_history[0], hard), here / "found.pt")
accelerator = trainer.accelerator
del trainer  # and end the threads between the two, which may abort the exit
accelerator.free_memory()
accelerator.end_training()
"""
# The Trainer wraps a model so on accelerators alone.
SHARDED = """
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from sadkern import span_kl
from sadkern.forward import head_projection, supervised_loss
from sadkern.teacher import OnlineTeacher
from sadkern.train import SpanCollator
dist.init_process_group("gloo")
mesh = dist.init_device_mesh("cpu", (2,))
projection = head_projection(student)
for module in (*student.model.layers, *([student.lm_head] if OWN_HEAD else []), student):
    fully_shard(module, mesh=mesh)
spans = SpanCollator(0)(examples)["span_ids"]
batch = SpanCollator(0)(examples[rank::2])
rows, inputs = batch["rows"], {name: batch[name] for name in ("input_ids", "attention_mask")}
signal, kinds = OnlineTeacher(teacher)(rows, **inputs), batch["span_ids"].flatten()[rows]
counts = [(spans == kind).sum() / 2 for kind in (1, 2)]
loss = supervised_loss(
    student, rows, lambda own: span_kl(own, signal, kinds, num_tokens=counts).loss, projection,
    **inputs,
)
loss.backward()
found = {name: p.grad.full_tensor() for name, p in student.named_parameters()}
if not rank:
    torch.save((found, {}, []), here / "found.pt")
dist.destroy_process_group()
"""
EASY_FIRST = {"padding_free": True, "curriculum": "linear"}
WRAPPED = {
    "ddp": "SETTINGS = {}" + TRAINER,
    "ddp, packed, easy ones first": f"SETTINGS = {EASY_FIRST}" + TRAINER,
    "fsdp": "OWN_HEAD = False" + SHARDED,
    "fsdp with a head of its own": "OWN_HEAD = True" + SHARDED,
}


@pytest.mark.parametrize("wrapped", WRAPPED)
def test_two_processes_give_the_gradient_of_one(tmp_path, examples, wrapped):
    student, teacher = small_model(0), small_model(1)
    _, gradient, logged = plainly(student, teacher, examples)
    student.save_pretrained(tmp_path / "student")
    teacher.save_pretrained(tmp_path / "teacher")
    torch.save(examples, tmp_path / "examples.pt")
    script = tmp_path / "rank.py"
    script.write_text(START + WRAPPED[wrapped])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*command, str(script), str(Path(__file__).parent)],
        capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found, entry, hard = torch.load(tmp_path / "found.pt")
    assert_same(found, gradient)
    if entry:
        assert {key: entry[key] for key in logged} == pytest.approx(logged, rel=1e-5)
    if "easy" in wrapped:
        alone = trainer_for(tmp_path, student, teacher, examples, **EASY_FIRST).train_dataset
        assert hard == pytest.approx([example["difficulty"] for example in alone], rel=1e-4)
