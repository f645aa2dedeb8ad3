"""What serves a call on an NVIDIA GPU where none is named: of each kernel, chip and length of rows
the backend that was measured to be faster there. Where nothing was measured it is Triton for what
its kernels keep on chip, and CUDA for what those would read more than once; on chips whose
second-level cache serves such reads (sm_90 on, where Triton's were measured) it is Triton too.
"""

from __future__ import annotations

import json
import math
from functools import cache
from importlib import resources
from types import ModuleType
from typing import Any, NamedTuple

from torch import Tensor

from sadkern.backends import cuda, triton
from sadkern.backends.kernels import MOST_TOKENS
from sadkern.backends.reference import RowValues
from sadkern.backends.triton import empty, plans, scale_, serves
from sadkern.sides import TopK

__all__ = ["choice", "divergence_rows", "empty", "scale_", "serves", "topk_rows"]


class Measured(NamedTuple):
    """Both backends' times of a kernel for rows of a length, in a run of `python -m bench.gpu`."""

    gpu: str
    capability: tuple[int, int]
    kernel: str  # a divergence, or topk
    vocab: int
    triton_s: float
    cuda_s: float


@cache
def measured() -> list[Measured]:
    """The committed table, measured.json."""
    rows = json.loads(resources.files(__package__).joinpath("measured.json").read_text())
    return [Measured(**{**row, "capability": tuple(row["capability"])}) for row in rows]


def choice(kernel: str, logits: Tensor, *others: Tensor, k: int = 0) -> tuple[str, str]:
    """The backend for rows of `logits` [..., V] (and what else is read or written), and why:
    measured, default, or what keeps CUDA from serving."""
    vocab, device = min(x.shape[-1] for x in (logits, *others)), logits.device
    refusal = cuda.serves(logits.dtype, device)
    if refusal is not None:
        return "triton", str(refusal)
    if vocab > cuda.longest(device) or k > MOST_TOKENS:
        return "triton", "does not fit"
    capability = plans.capability_of(device)
    known = [x for x in measured() if (x.capability, x.kernel) == (capability, kernel)]
    if known:
        nearest = min(known, key=lambda x: abs(math.log(x.vocab / vocab)))
        return ("triton" if nearest.triton_s <= nearest.cuda_s else "cuda"), nearest.gpu
    of = "topk" if kernel == "topk" else plans.kind_of(kernel)
    kept = plans.choose(of, capability, vocab, logits, *others, tokens=k).TILES > 0
    return ("triton" if kept or capability >= (9, 0) else "cuda"), "default"


def divergence_rows(
    student: Tensor,
    teacher: Tensor | TopK,
    supervised: Tensor,
    row_weights: Tensor,
    labels: Tensor | None,
    dstudent: Tensor | None,
    *,
    divergence: str,
    **options: Any,
) -> RowValues:
    """As `reference.divergence_rows`."""
    serving: ModuleType = triton
    if isinstance(teacher, Tensor):
        gradient = [] if dstudent is None else [dstudent]
        serving = _backend(choice(divergence, student, teacher, *gradient)[0])
    return serving.divergence_rows(
        student, teacher, supervised, row_weights, labels, dstudent, divergence=divergence,
        **options,
    )  # fmt: skip


def topk_rows(logits: Tensor, k: int, temperature: float) -> TopK:
    """As `reference.topk_rows`."""
    return _backend(choice("topk", logits, k=k)[0]).topk_rows(logits, k, temperature)


def _backend(name: str) -> ModuleType:
    return cuda if name == "cuda" else triton
