"""The command itself; what it can do is in the modules beside this."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperGroup

ORDER = "demo inspect train cache eval generate plan info".split()


class _InOrder(TyperGroup):
    def list_commands(self, ctx: Any) -> list[str]:
        """As one comes to use them."""
        return sorted(super().list_commands(ctx), key=ORDER.index)


app = typer.Typer(
    cls=_InOrder,
    help="Structured agent distillation: align a small agent to a large one, span by span.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={
        "help_option_names": ["-h", "--help"],
        # --max_length too, as `train` has it.
        "token_normalize_func": lambda option: option.replace("_", "-"),
    },
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
