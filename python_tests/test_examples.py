"""The examples run as they stand."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from small_models import RECORDS, small_model, small_tokenizer

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
pytestmark = pytest.mark.skipif(not EXAMPLES.is_dir(), reason="needs examples/ beside the tests")


def run(name: str, *arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *map(str, arguments)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
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


def test_distil(tmp_path):
    small_model(0).save_pretrained(tmp_path / "student")
    small_model(1, hidden=24, scale=2.0).save_pretrained(tmp_path / "teacher")
    small_tokenizer().save_pretrained(tmp_path / "student")
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in RECORDS))
    out = run(
        "distil.py", tmp_path / "student", tmp_path / "teacher", tmp_path / "data.jsonl",
        tmp_path / "out", "--epochs", 8, "--batch-size", 4, "--learning-rate", 1e-2,
    )  # fmt: skip
    for span in ("reason", "act"):
        before, after = map(float, re.search(rf"{span}_kl +([\d.]+) -> +([\d.]+)", out).groups())
        assert after < 0.9 * before
    assert (tmp_path / "out" / "model.safetensors").exists()
