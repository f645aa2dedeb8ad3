"""A run that ends before its end leaves a checkpoint of its last whole step."""

from __future__ import annotations

import logging
import random
import signal
import threading
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback

logger = logging.getLogger(__name__)
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopOnSignal(TrainerCallback):
    """Ctrl-C, or a cluster's SIGTERM, ends the run after the step it is at, which is saved; a
    second one at once. Of several processes all end after the step that follows, if one got it."""

    def __init__(self) -> None:
        self.received: int | None = None
        self.heard: Tensor | None = None
        """of several processes: the largest that one of them had received when the step began"""
        self._before: dict[int, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.received = self.heard = None
        if threading.current_thread() is threading.main_thread():  # Python's rule for handlers
            # What is ignored stays so: a shell has Ctrl-C pass by what it runs in the background.
            heeded = [n for n in SIGNALS if signal.getsignal(n) is not signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._receive) for number in heeded}

    def _receive(self, number: int, _: Any) -> None:
        self.received = number
        self.restore()
        logger.warning(
            "%s: the run stops after this step and saves it; again: it stops at once",
            signal.Signals(number).name,
        )

    def restore(self) -> None:
        """Gives the signals back to whoever had them."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        known = self.received
        if self.heard is not None:
            # What came since is of the next step: another process may be through with this one.
            known = int(self.heard.item()) or None
        if known is not None:
            self.received = known
            control.should_save = control.should_training_stop = True
        return control


class Randomness:
    """The state of all generators of random numbers that a checkpoint keeps."""

    def __init__(self) -> None:
        self.python = random.getstate()
        self.numpy = np.random.get_state()  # noqa: NPY002 (the one that others draw from)
        self.torch = torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []

    def restore(self) -> None:
        random.setstate(self.python)
        np.random.set_state(self.numpy)  # noqa: NPY002
        torch.set_rng_state(self.torch)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)


def save_last_step(trainer: Trainer, before: Randomness | None, error: Exception) -> None:
    """Saves what `trainer` had before the step in which `error` came, and logs where; says why not
    where that cannot be: nothing done yet, several processes, weights that are not finite."""
    step = trainer.state.global_step
    model: Any = trainer.model
    why = ""
    if not step:
        why = "no step is done yet"
    elif trainer.args.world_size > 1:
        why = "other processes may not have come to that"
    elif not all(p.isfinite().all() for p in model.parameters()):
        why = "the weights are not finite"
    if why:
        logger.error("stopped at step %d, of which no checkpoint is saved: %s", step, why)
        return
    if before is not None:
        before.restore()
    trainer._save_checkpoint(model, trial=None)
    logger.error(
        "stopped after step %d by %s: %s. It is saved in %s; the same command with "
        "--resume_from_checkpoint last goes on",
        step, type(error).__name__, error, trainer.args.output_dir,
    )  # fmt: skip
