"""`sadkern info`."""

from __future__ import annotations

import typer

from sadkern.cli.app import app


@app.command()
def info() -> None:
    """Say which kernels were built and which this machine uses.

    sadkern info
    """
    from sadkern import __version__, build_info

    typer.echo(f"sadkern {__version__}")
    for key, value in build_info().items():
        typer.echo(f"  {key}: {', '.join(value) if isinstance(value, list) else value}")
