"""A run that is killed and goes on ends, bit for bit, where one that was left alone does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_models import RECORDS, small_model, small_tokenizer
from test_train import trainer_for
from transformers import TrainerCallback

from sadkern.data import prepare
from sadkern.teacher import CachedTeacher, OnlineTeacher
from sadkern.train.script import last_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")
RUNS = {
    "plain": {},
    "curriculum": {"curriculum": "linear", "curriculum_epochs": 2.0},
    "packed": {"padding_free": True, "curriculum": "root"},
    "accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "in backward": {"optimizer_in_backward": True},
    "cached": {"cached": True, "curriculum": "step"},
}


def run(folder: Path, settings: dict, *callbacks, resume: bool = False):
    """12 steps of 3 or 4 trajectories, over several epochs, with dropout."""
    settings = {
        "per_device_train_batch_size": 3, "max_steps": 12, "save_strategy": "steps",
        "save_steps": 4, "lr_scheduler_type": "cosine", "warmup_steps": 2, **settings,
    }  # fmt: skip
    tokenizer = small_tokenizer()
    student, teacher = small_model(7 if resume else 0), OnlineTeacher(small_model(1))
    if settings.pop("cached", False):
        teacher = CachedTeacher(folder / "cache", teacher, tokenizer=tokenizer, k=20)
    for layer in student.model.layers:
        layer.self_attn.attention_dropout = 0.3
    trainer = trainer_for(
        folder, student, teacher, prepare(RECORDS, tokenizer), tokenizer, **settings
    )
    trainer.remove_callback(trainer.gradients)
    for callback in callbacks:
        trainer.add_callback(callback)
    trainer.train(resume_from_checkpoint=last_checkpoint(folder / "out") if resume else None)
    return trainer


class Killed(TrainerCallback):
    """After the seventh step."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 7:
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("name", RUNS)
def test_killed_and_resumed_it_is_the_same(tmp_path, name):
    whole = run(tmp_path / "whole", RUNS[name])
    killed = subprocess.run(
        [sys.executable, __file__, str(tmp_path / "killed"), name],
        capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-3000:]
    assert Path(last_checkpoint(tmp_path / "killed" / "out")).name == "checkpoint-4"
    resumed = run(tmp_path / "killed", RUNS[name], resume=True)
    for key, expected in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[key], expected), key

    def logged(trainer):
        measured = ("tokens_per_second", "peak_memory_gb")
        logs = [log for log in trainer.state.log_history if "loss" in log]
        return [{k: v for k, v in log.items() if k not in measured} for log in logs]

    assert logged(resumed) == logged(whole)
    assert [log["step"] for log in logged(whole)] == list(range(1, 13))


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(Path(sys.argv[1]), RUNS[sys.argv[2]], Killed())
