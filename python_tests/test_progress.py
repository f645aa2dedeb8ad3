"""The bar shows the run's figures; where nobody looks, lines do."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console
from small_models import small_model
from small_trainers import trainer_for

pytestmark = pytest.mark.usefixtures("one_thread")


def told(tmp_path, examples, terminal, **settings):
    trainer = trainer_for(
        tmp_path, small_model(0), small_model(1), examples,
        disable_tqdm=False, max_steps=3, **settings,
    )  # fmt: skip
    out = io.StringIO()
    trainer.progress.console = Console(file=out, force_terminal=terminal, width=120)
    trainer.train()
    return out.getvalue(), [log for log in trainer.state.log_history if "loss" in log]


def test_a_line_for_each_log(tmp_path, examples):
    text, logs = told(tmp_path, examples, terminal=False)
    lines = text.splitlines()
    assert len(lines) == 3
    for step, (line, log) in enumerate(zip(lines, logs, strict=True), 1):
        figures = re.fullmatch(
            rf"step {step}/3  loss (\S+)  reason (\S+)  act (\S+)  \d+ tokens/s", line
        )
        assert [float(x) for x in figures.groups()] == pytest.approx(
            [log["loss"], log["reason/kl"], log["act/kl"]], rel=1e-3
        )


def test_a_bar_on_a_terminal(tmp_path, examples):
    text, logs = told(tmp_path, examples, terminal=True)
    assert "training" in text
    assert re.search(r"3/3", text)
    assert f"reason {logs[-1]['reason/kl']:.4g}" in text


def test_none_where_none_is_wanted(tmp_path, examples):
    trainer = trainer_for(tmp_path, small_model(0), small_model(1), examples)
    assert trainer.progress not in trainer.callback_handler.callbacks
