"""A teacher in memory, run on each batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sadkern.forward import output_head, supervised_logits


class OnlineTeacher:
    """Runs a causal LM without gradient; its head sees the supervised rows only.

    The model is put into eval mode and frozen: nothing of it is ever trained.
    """

    def __init__(self, model: nn.Module):
        output_head(model)  # a model without one is refused here, not in the first step
        self.model = model.eval().requires_grad_(False)

    def __call__(self, rows: Tensor, **inputs: Any) -> Tensor:
        """Logits `[M, V]` of `rows [M]`; see `TeacherSource`."""
        with torch.inference_mode():
            return supervised_logits(self.model, rows, **inputs)
