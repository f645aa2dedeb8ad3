"""The command `sadkern`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

try:
    import typer
except ImportError:  # pragma: no cover
    sys.exit("the command sadkern needs typer: expected `pip install 'sadkern[train]'`")

app = typer.Typer(
    help="Structured agent distillation: align a small agent to a large one, span by span.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


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
    seed: Annotated[
        int, typer.Option(help="Of initial weights and order; another, other numbers.")
    ] = 0,
) -> None:
    """Train a small teacher on shipped trajectories, distil a smaller student, print how it went.

    Everything is real and on this machine's CPU: under four minutes on two cores.
    """
    from sadkern.demo.run import main as run

    run(output_dir, seed)


@app.command()
def inspect(
    data: Annotated[
        list[Path], typer.Argument(help="Files of trajectories: JSON Lines or JSON, gzip or not.")
    ],
    profile: Annotated[
        str, typer.Option(help="How they are written: auto, a profile's name, or a .yaml file.")
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
    seed: Annotated[int, typer.Option(help="Of which are shown.")] = 0,
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

    Exit status: 1 where a line is no trajectory (it is named, and the rest goes on), else 0.

    sadkern inspect trajectories.jsonl --tokenizer student/ --max-length 512 --html report.html
    """
    from sadkern.inspect.script import main as run

    raise typer.Exit(
        run(
            data, profile, tokenizer, max_length, samples, seed,
            as_json=as_json, html=html, png=png,
        )
    )  # fmt: skip


@app.command()
def info() -> None:
    """Say which kernels were built and which this machine uses."""
    from sadkern import __version__, build_info

    typer.echo(f"sadkern {__version__}")
    for key, value in build_info().items():
        typer.echo(f"  {key}: {', '.join(value) if isinstance(value, list) else value}")


def main() -> None:
    """Entry point of the command."""
    app()


if __name__ == "__main__":
    main()
