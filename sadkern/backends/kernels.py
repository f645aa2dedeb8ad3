"""What the backends with kernels do alike: which dtypes they take, how they hand tensors over."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sadkern.backends.reference import RowValues

MOST_TOKENS = 1024  # of a top-k, as csrc/cuda/topk.h has it
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def refuses(
    backend: str, dtype: torch.dtype, known: dict[torch.dtype, str] = DTYPES
) -> ValueError | None:
    """The error for logits of a dtype that `backend` does not take; None where it does."""
    if dtype in known:
        return None
    return ValueError(
        f"backend={backend!r} takes {', '.join(known.values())} logits, got {dtype}; "
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


def addresses(arguments: dict[str, Any]) -> dict[str, Any]:
    """As compiled kernels take them: tensors go as their addresses, an absent one is 0."""
    return {
        name: value.data_ptr() if isinstance(value, Tensor) else 0 if value is None else value
        for name, value in arguments.items()
    }


def addressed(logits: Tensor) -> Tensor:
    """The same, or a copy, such that a row lies in one piece and rows are two strides apart."""
    if (logits.stride(-1) == 1 or logits.shape[-1] == 1) and len(_dimensions(logits)) <= 2:
        return logits
    return logits.contiguous()


def rows_of(logits: Tensor) -> tuple[int, int, int]:
    """I, outer and inner stride of `addressed` logits, whose leading dimensions lie like
    [N / I, I]."""
    inner, outer, *_ = [*_dimensions(logits), (1, 0), (1, 0)]
    return inner[0], outer[1], inner[1]


def _dimensions(logits: Tensor) -> list[tuple[int, int]]:
    """Sizes and strides of what leads, the last one first; what lies like one dimension is one."""
    found: list[tuple[int, int]] = []
    for size, stride in reversed(list(zip(logits.shape[:-1], logits.stride()[:-1], strict=True))):
        if found and stride == found[-1][0] * found[-1][1]:
            found[-1] = (found[-1][0] * size, found[-1][1])
        elif size != 1:
            found.append((size, stride))
    return found
