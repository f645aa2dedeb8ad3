"""Processes that begin where everything is imported already, which takes seconds: forks of one
that does nothing else."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(
    ["pytest", "triton", "transformers.models.llama.modeling_llama", "sadkern.train.script"]
)


def run(function: Callable[..., Any], *arguments: Any) -> subprocess.CompletedProcess[str]:
    """`function(*arguments)`, a module's own, in such a process: its status, and what it wrote."""
    with tempfile.TemporaryDirectory() as folder:
        written = [str(Path(folder, name)) for name in ("stdout", "stderr")]
        for path in written:
            Path(path).touch()  # also where it comes to nothing before it writes
        process = FORKED.Process(target=_written, args=(written, function, arguments))
        process.start()
        process.join()
        texts = [Path(path).read_text() for path in written]
        return subprocess.CompletedProcess([], process.exitcode, *texts)


def script(path: Path, *arguments: Any) -> subprocess.CompletedProcess[str]:
    """`python path *arguments`."""
    return run(_script, str(path), list(map(str, arguments)))


def _written(written: list[str], function: Callable[..., Any], arguments: tuple) -> None:
    for number, path in enumerate(written, 1):
        opened = os.open(path, os.O_WRONLY)
        os.dup2(opened, number)
        os.close(opened)
    function(*arguments)


def _script(path: str, arguments: list[str]) -> None:
    sys.argv = [path, *arguments]
    runpy.run_path(path, run_name="__main__")
