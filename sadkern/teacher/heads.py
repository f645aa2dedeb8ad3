"""A teacher's head where its hidden states are."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from sadkern.sides import Projection, moved


class Heads:
    """A head of no rows, `own`, and a copy of it on each device that hidden states come to."""

    def __init__(self, own: Projection):
        self.own = own
        self._on: dict[torch.device, Projection] = {own.weight.device: own}

    def of(self, hidden: Tensor) -> Projection:
        """The head with those rows `[M, D]`, on their device."""
        if hidden.device not in self._on:
            self._on[hidden.device] = moved(self.own, hidden.device)
        return replace(self._on[hidden.device], hidden=hidden)
