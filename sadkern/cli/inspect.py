"""`sadkern inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sadkern.cli.app import app, told
from sadkern.spans import PROFILES


@app.command()
def inspect(
    data: Annotated[
        list[Path], typer.Argument(help="Files of trajectories: JSON Lines or JSON, gzip or not.")
    ],
    profile: Annotated[
        str,
        typer.Option(help=f"How they are written: auto, {', '.join(PROFILES)}, or a .yaml file."),
    ] = "auto",
    tokenizer: Annotated[
        str | None,
        typer.Option(help="Of the student: lengths are in its tokens, chats by its template."),
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(help="Tokens of a trajectory that are kept; what is cut is told.")
    ] = None,
    samples: Annotated[
        int, typer.Option(help="Trajectories of each environment that are shown in colour.")
    ] = 1,
    seed: Annotated[int, typer.Option(help="Seed of the draw of those that are shown.")] = 0,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object to standard output, no samples.")
    ] = False,
    html: Annotated[
        Path | None, typer.Option(help="A page with table, histograms and samples, to write.")
    ] = None,
    png: Annotated[
        Path | None, typer.Option(help="The histograms of span lengths, to write.")
    ] = None,
) -> None:
    """Show what in files of trajectories would be trained on: REASON in blue, ACT in red.

    Exit status: 1 where a line is no trajectory (it is named, and the rest goes on) or none is
    there, else 0.

    sadkern inspect trajectories.jsonl --tokenizer student/ --max-length 512 --html report.html
    """
    from sadkern.inspect.script import main as run

    with told():
        code = run(
            data, profile, tokenizer, max_length, samples, seed,
            as_json=as_json, html=html, png=png,
        )  # fmt: skip
    raise typer.Exit(code)
