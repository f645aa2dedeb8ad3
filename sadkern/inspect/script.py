"""`sadkern inspect`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from sadkern.inspect import Survey, survey
from sadkern.inspect.terminal import show
from sadkern.spans.profile import profile_named
from sadkern.teacher.named import model_named


def main(
    data: list[Path],
    profile: str,
    tokenizer: str | None,
    max_length: int | None,
    samples: int,
    seed: int,
    *,
    as_json: bool,
    html: Path | None,
    png: Path | None,
) -> int:
    """The exit status."""
    for path in data:
        if not path.is_file():
            raise typer.BadParameter(f"{path}: expected a file", param_hint="DATA")
    try:
        chosen = "auto" if profile == "auto" else profile_named(profile)
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error), param_hint="--profile") from error
    if max_length is not None and (tokenizer is None or max_length < 1):
        expected = "a --tokenizer beside it" if tokenizer is None else "at least 1"
        raise typer.BadParameter(f"expected {expected}", param_hint="--max-length")
    reader = None if tokenizer is None else _tokenizer(tokenizer)
    with _progress() as progress:
        tasks = {
            str(path): progress.add_task(path.name, total=path.stat().st_size) for path in data
        }
        found = survey(
            data,
            profile=chosen,
            tokenizer=reader,
            max_length=max_length,
            samples=0 if as_json and html is None else samples,
            seed=seed,
            progress=lambda path, read: progress.update(tasks[path], completed=read),
        )
    _write(found, html, png)
    if as_json:
        print(json.dumps(found.as_dict(), ensure_ascii=False))
    else:
        show(found, Console())
    return int(bool(found.faults) or not found.whole.trajectories)


def _tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model_named(name))
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error), param_hint="--tokenizer") from error


def _progress() -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    return Progress(*columns, console=Console(stderr=True), transient=True)


def _write(found: Survey, html: Path | None, png: Path | None) -> None:
    if png is not None:
        from sadkern.inspect.figure import save_png

        save_png(found, png)
    if html is not None:
        from sadkern.inspect.report import page

        html.write_text(page(found), encoding="utf-8")
