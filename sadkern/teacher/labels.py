"""No teacher at all: the trajectory's own tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sadkern.sides import TopK


class HardLabels:
    """Is certain of each trajectory's own next token, equation (13): forward KL to it is the
    cross-entropy.

    >>> import torch
    >>> from sadkern import span_kl
    >>> from sadkern.teacher import HardLabels
    >>> rows = torch.tensor([0, 1])
    >>> signal = HardLabels()(rows, input_ids=torch.tensor([[5, 7, 6]]))
    >>> student = torch.randn(2, 9)
    >>> loss = span_kl(student, signal, torch.tensor([1, 1])).loss
    >>> hard = torch.nn.functional.cross_entropy(student, torch.tensor([7, 6]))
    >>> torch.allclose(loss, hard)
    True
    """

    def __call__(self, rows: Tensor, **inputs: Any) -> TopK:
        """See `TeacherSource`."""
        ids = inputs["input_ids"].flatten()[rows + 1, None]
        certain = torch.zeros(len(rows), device=rows.device)
        return TopK(ids, certain[:, None], tail_mass=certain, entropy=certain)
