"""How far a run is, and how it goes."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

SHOWN = {"loss": "loss", "reason/kl": "reason", "act/kl": "act"}


class RichProgress(TrainerCallback):
    """A bar with the last figures beside it; where nobody looks (a file, a pipe) a line for each
    log."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self._bar: Progress | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero and self.console.is_terminal:
            self._bar = Progress(
                TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
                TextColumn("{task.fields[told]}"), console=self.console,
            )  # fmt: skip
            self._task = self._bar.add_task(
                "training", total=state.max_steps, completed=state.global_step, told=""
            )
            self._bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        shown = [f"{name} {logs[key]:.4g}" for key, name in SHOWN.items() if key in logs]
        if "tokens_per_second" in logs:
            shown.append(f"{logs['tokens_per_second']:.0f} tokens/s")
        if self._bar is not None and shown:
            self._bar.update(self._task, told="  ".join(shown))
        elif state.is_world_process_zero and shown:
            step = f"step {state.global_step}/{state.max_steps}"
            self.console.print("  ".join([step, *shown]), highlight=False, soft_wrap=True)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.close()

    def close(self) -> None:
        """Gives the terminal back."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
