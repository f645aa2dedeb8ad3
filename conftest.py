"""Every code block of the documentation is a test. A document's blocks run in their order: Python
in one namespace, commands in one folder, beside the models and trajectories that they name.

A block that cannot run here says why, before it: `<!-- skip: next "why" -->`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from threading import Thread
from typing import Any

import yaml
from sybil import Example, Sybil
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser, SkipParser

ROOT = Path(__file__).resolve().parent
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "docs/*.md")
SECONDS = 300  # that a block of commands may take
SERVER = "http://localhost:8000"


def in_folder(namespace: dict[str, Any]) -> None:
    """A folder with what documents call STUDENT, TEACHER and their trajectories."""
    from small_models import RECORDS, small_model, small_tokenizer

    folder = tempfile.TemporaryDirectory()
    namespace["_folder"], namespace["_left"] = folder, os.getcwd()
    os.chdir(folder.name)
    small_model(0, hidden=64).save_pretrained("STUDENT")
    small_model(1, hidden=96, scale=2.0).save_pretrained("TEACHER")
    for name in ("STUDENT", "TEACHER"):
        small_tokenizer().save_pretrained(name)
    for name, records in {"trajectories": RECORDS[:6], "held_out": RECORDS[6:]}.items():
        Path(f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def out_of_folder(namespace: dict[str, Any]) -> None:
    if "_server" in namespace:
        namespace["_server"].shutdown()
    os.chdir(namespace["_left"])
    namespace["_folder"].cleanup()


def in_shell(example: Example) -> str | None:
    """What went wrong, if anything did. A server on localhost:8000 is there for whom it names."""
    commands = str(example.parsed)
    if SERVER in commands:
        commands = commands.replace(SERVER, server(example.namespace))
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "COLUMNS": "100",
    }
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands],
        env=environment, capture_output=True, text=True, timeout=SECONDS, check=False,
    )  # fmt: skip
    return f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}" if done.returncode else None


def server(namespace: dict[str, Any]) -> str:
    """The address of one that answers as vLLM does, until the document ends."""
    from test_served import Server

    served = namespace["_server"] = Server()
    Thread(target=served.serve_forever, daemon=True).start()
    return served.url


def as_file(example: Example) -> None:
    """YAML: it is read, and kept under the name that its first line is a comment of, if any."""
    text = str(example.parsed)
    assert yaml.safe_load(text)
    first = text.splitlines()[0].removeprefix("# ")
    if first.endswith((".yaml", ".yml")):
        Path(first).write_text(text)


pytest_collect_file = Sybil(
    path=str(ROOT),
    patterns=DOCUMENTS,
    parsers=[
        SkipParser(),
        PythonCodeBlockParser(),
        CodeBlockParser("bash", in_shell),
        CodeBlockParser("yaml", as_file),
    ],
    setup=in_folder,
    teardown=out_of_folder,
).pytest()
