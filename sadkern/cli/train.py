"""`sadkern train` and `sadkern demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sadkern.cli.app import app, told


@app.command(
    context_settings={
        "allow_extra_args": True,
        "ignore_unknown_options": True,
        "help_option_names": [],
    }
)
def train(context: typer.Context) -> None:
    """Distil a teacher into a student on a file of trajectories (`train --help` says how).

    sadkern train --model_name_or_path student/ --teacher_model_name_or_path teacher/
    --dataset_name trajectories.jsonl --output_dir runs/student
    """
    from sadkern.train.script import main as run

    run(context.args)


@app.command()
def demo(
    output_dir: Annotated[
        Path, typer.Option(help="Where models, figures and the picture go.")
    ] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(help="Seed of initial weights and order.")] = 0,
) -> None:
    """Train a small teacher on shipped trajectories, distil a smaller student, print how it went.

    sadkern demo

    Everything is real and on this machine's CPU: under four minutes on two cores.
    """
    with told():
        output_dir.mkdir(parents=True, exist_ok=True)
        from sadkern.demo.run import main as run

        run(output_dir, seed)
