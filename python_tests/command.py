"""`sadkern` as one types it."""

from __future__ import annotations

from click.testing import Result
from typer.testing import CliRunner

from sadkern.cli import app


def sadkern(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])
