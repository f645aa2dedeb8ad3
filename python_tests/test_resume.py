"""A run that is killed and goes on ends, bit for bit, where one that was left alone does."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path

import forked
import pytest
import torch
from small_models import RECORDS, small_model, small_tokenizer
from small_trainers import repeatable, trainer_for
from transformers import TrainerCallback

from sadkern.data import prepare
from sadkern.teacher import CachedTeacher, OnlineTeacher, ServerError
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


def run(folder: Path, settings: dict, *callbacks, resume: bool = False, teacher=None):
    """12 steps of 3 or 4 trajectories, over several epochs, with dropout."""
    settings = {
        "per_device_train_batch_size": 3, "max_steps": 12, "save_strategy": "steps",
        "save_steps": 4, "lr_scheduler_type": "cosine", "warmup_steps": 2, **settings,
    }  # fmt: skip
    tokenizer = small_tokenizer()
    student, teacher = small_model(7 if resume else 0), teacher or OnlineTeacher(small_model(1))
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


def run_killed(folder: Path, name: str) -> None:
    torch.set_num_threads(1)
    run(folder, RUNS[name], Killed())


def logged(trainer):
    return [repeatable(log) for log in trainer.state.log_history if "loss" in log]


def assert_same_run(found, expected):
    for key, weight in expected.model.state_dict().items():
        assert torch.equal(found.model.state_dict()[key], weight), key
    assert logged(found) == logged(expected)
    assert [log["step"] for log in logged(found)] == list(range(1, 13))


@pytest.mark.parametrize("name", RUNS)
def test_killed_and_resumed_it_is_the_same(tmp_path, name):
    whole = run(tmp_path / "whole", RUNS[name])
    killed = forked.run(run_killed, tmp_path / "killed", name)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-3000:]
    assert Path(last_checkpoint(tmp_path / "killed" / "out")).name == "checkpoint-4"
    resumed = run(tmp_path / "killed", RUNS[name], resume=True)
    assert_same_run(resumed, whole)


@pytest.fixture
def _heeded():
    """SIGINT does what it does in the foreground, also where the tests run in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Interrupted(TrainerCallback):
    """In the middle of a step; what Python's own handler would raise is not."""

    def __init__(self, number, at=6):
        self.number, self.at = number, at

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.at:
            signal.raise_signal(self.number)  # to this thread: os.kill would let any have it


@pytest.mark.usefixtures("_heeded")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_the_step_and_the_run_goes_on_from_there(tmp_path, number, caplog):
    whole = run(tmp_path / "whole", {})
    before = signal.getsignal(number)
    stopped = run(tmp_path / "stopped", {}, Interrupted(number))
    assert stopped.stop.received == number
    assert stopped.state.global_step == 7
    assert "the run stops after this step and saves it" in caplog.text
    assert signal.getsignal(number) == before
    assert Path(last_checkpoint(tmp_path / "stopped" / "out")).name == "checkpoint-7"
    assert_same_run(run(tmp_path / "stopped", {}, resume=True), whole)


@pytest.mark.usefixtures("_heeded")
def test_a_second_signal_ends_it_at_once(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, {}, Interrupted(signal.SIGINT), Interrupted(signal.SIGINT))


@pytest.mark.usefixtures("_heeded")
def test_a_signal_that_is_ignored_stays_so(tmp_path):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    assert run(tmp_path, {}, Interrupted(signal.SIGINT)).state.global_step == 12


class Dying(OnlineTeacher):
    """Answers so many times."""

    left = 7

    def __call__(self, rows, **inputs):
        self.left -= 1
        if self.left < 0:
            raise ServerError("http://localhost:8000 failed 6 times, last by: ConnectError")
        return super().__call__(rows, **inputs)


class Exploding(Dying):
    """And then with what is not a number."""

    def __call__(self, rows, **inputs):
        side = OnlineTeacher.__call__(self, rows, **inputs)
        self.left -= 1
        return replace(side, hidden=side.hidden * float("nan")) if self.left < 0 else side


@pytest.mark.parametrize(
    ("teacher", "error", "steps"),
    [(Dying, ServerError, 1), (Exploding, FloatingPointError, 1), (Dying, ServerError, 2)],
)
def test_a_teacher_that_dies_costs_no_step(tmp_path, teacher, error, steps, caplog):
    settings = {"per_device_train_batch_size": 3 // steps, "gradient_accumulation_steps": steps}
    whole = run(tmp_path / "whole", settings)
    with pytest.raises(error):
        run(tmp_path / "died", settings, teacher=teacher(small_model(1)))
    at = 7 // steps
    assert f"stopped after step {at} by {error.__name__}" in caplog.text
    assert "--resume_from_checkpoint last goes on" in caplog.text
    assert Path(last_checkpoint(tmp_path / "died" / "out")).name == f"checkpoint-{at}"
    assert_same_run(run(tmp_path / "died", settings, resume=True), whole)


def test_what_is_not_finite_is_not_saved(tmp_path, caplog):
    class Ruined(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 3:
                model.lm_head.weight.data[0] = float("nan")

    with pytest.raises(FloatingPointError, match="step 3: the divergence of trajectory"):
        run(tmp_path, {}, Ruined())
    assert "stopped at step 3, of which no checkpoint is saved: the weights are not finite" in (
        caplog.text
    )
    assert last_checkpoint(tmp_path / "out") is None
