"""The command `sadkern`: a module a command, which loads what it needs when it is called."""

import logging
import sys

try:
    import typer as _  # noqa: F401
except ImportError:
    sys.exit(
        "the command sadkern needs more than the package: expected `pip install 'sadkern[train]'`"
    )

from sadkern.cli import cache, info, inspect, plan, play, train  # noqa: F401
from sadkern.cli.app import app

__all__ = ["app", "main"]


def main() -> None:
    """Entry point of the command."""
    # transformers imports what is installed of these, and they say what they could not load.
    for name in ("torchao", "bitsandbytes", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    app()
