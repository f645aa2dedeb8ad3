"""The command itself; what it can do is in the modules beside this."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer

app = typer.Typer(
    help="Structured agent distillation: align a small agent to a large one, span by span.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
GOES_ON = "what is done is kept, and the same command goes on"


@contextmanager
def told(interrupted: str = "") -> Iterator[None]:
    """What is wrong with the input is said in a line, without a traceback. `interrupted`: what is
    said where Ctrl-C ends it."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(f"interrupted{interrupted and ': '}{interrupted}", err=True)
        raise typer.Exit(130) from None
    except (ValueError, LookupError, OSError, RuntimeError, ImportError) as error:
        typer.echo(f"error: {error.args[0] if isinstance(error, KeyError) else error}", err=True)
        raise typer.Exit(2) from None
