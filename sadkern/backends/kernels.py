"""What the backends with kernels do alike: which dtypes they take, how they hand tensors over."""

from __future__ import annotations

import torch
from torch import Tensor

from sadkern.backends.reference import RowValues

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def refuses(backend: str, dtype: torch.dtype) -> ValueError | None:
    """The error for logits of a dtype that `backend` does not take; None where it does."""
    if dtype in DTYPES:
        return None
    return ValueError(
        f"backend={backend!r} takes {', '.join(DTYPES.values())} logits, got {dtype}; "
        "backend='reference' takes any"
    )


def empty_values(sizes: torch.Size, device: torch.device) -> RowValues:
    """For a kernel to write; the mass of the tail, which not all write, is 0."""
    value, cross_entropy, entropy = (
        torch.empty(sizes, dtype=torch.float32, device=device) for _ in range(3)
    )
    agreement = torch.empty(sizes, dtype=torch.bool, device=device)
    return RowValues(value, cross_entropy, entropy, agreement, torch.zeros(sizes, device=device))


def contiguous(tensor: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None:
    """The same, or a copy, in one piece and in `dtype`."""
    return None if tensor is None else tensor.to(dtype or tensor.dtype).contiguous()
