"""What `sadkern plan` does."""

from __future__ import annotations

import json
import sys

from rich.console import Console

from sadkern.plan import show
from sadkern.plan.estimate import estimate
from sadkern.plan.setting import Setting
from sadkern.plan.track import tracked


def main(setting: Setting, gpu: str, *, track: bool, compare: bool, as_json: bool) -> None:
    """ValueError: a model, a card or a choice that is not known."""
    show.budget_of(gpu)
    found = estimate(setting)
    step = None
    if track:
        with Console(stderr=True).status("tracking a step"):
            step = tracked(setting)
    if as_json:
        json.dump(show.as_json(found, gpu, step, compare), sys.stdout, indent=1)
        print()
    else:
        console = Console(width=None if sys.stdout.isatty() else 100)
        show.show(found, gpu, step, compare, console)
