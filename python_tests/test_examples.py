"""The examples run as they stand."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import forked
import nbformat
import pytest
from nbclient import NotebookClient
from small_models import RECORDS, small_model, small_tokenizer

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
pytestmark = pytest.mark.skipif(not EXAMPLES.is_dir(), reason="needs examples/ beside the tests")


def run(name: str, *arguments: object) -> str:
    done = forked.script(EXAMPLES / name, *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize(
    "command", [("own_loop.py",), ("hidden_states.py",), ("hidden_states.py", "--top-k", 32)]
)
def test_loops_of_ones_own(command):
    lines = re.findall(r"thoughts ([\d.]+), of actions ([\d.]+)", run(*command))
    first, last = (tuple(map(float, lines[i])) for i in (0, -1))
    assert last[0] < 0.5 * first[0]
    assert last[1] < 0.2 * first[1]


@pytest.fixture
def files(tmp_path):
    """Two models and their data."""
    small_model(0).save_pretrained(tmp_path / "student")
    small_model(1, hidden=24, scale=2.0).save_pretrained(tmp_path / "teacher")
    small_tokenizer().save_pretrained(tmp_path / "student")
    small_tokenizer().save_pretrained(tmp_path / "teacher")
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in RECORDS))
    return tmp_path


def test_distil(files):
    tmp_path = files
    out = run(
        "distil.py", tmp_path / "student", tmp_path / "teacher", tmp_path / "data.jsonl",
        tmp_path / "out", "--epochs", 8, "--batch-size", 4, "--learning-rate", 1e-2,
    )  # fmt: skip
    for span in ("reason", "act"):
        before, after = map(float, re.search(rf"{span}_kl +([\d.]+) -> +([\d.]+)", out).groups())
        assert after < 0.9 * before
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_the_papers_students_one_after_the_other(files):
    """And run again: what is finished is left out."""

    def paper(*options):
        return subprocess.run(
            [
                "bash", EXAMPLES / "paper.sh", files / "data.jsonl", files / "runs", "gpt2-120m",
                "--",
                "--model_name_or_path", files / "student",
                "--teacher_model_name_or_path", files / "teacher",
                "--max_steps", "2", "--save_steps", "1", "--bf16", "false", "--use_cpu", *options,
            ],
            capture_output=True, text=True, check=False,
            env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        )  # fmt: skip

    done = paper()
    assert done.returncode == 0, done.stderr[-3000:]
    state = json.loads((files / "runs" / "gpt2-120m" / "trainer_state.json").read_text())
    assert state["global_step"] == 2
    assert state["log_history"][0]["curriculum/difficulty"] is not None  # of paper.yaml
    assert "gpt2-120m is finished" in paper().stdout


def test_notebook(tmp_path):
    """Every cell runs, the last figures are asserted in it, and what is committed ran once."""
    path = EXAMPLES / "distil_an_agent.ipynb"
    kept = nbformat.read(path, 4)
    cells = [cell for cell in kept.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    where = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(kept, timeout=600, resources=where).execute()
