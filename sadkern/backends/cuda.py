"""CUDA kernels for rows that fit on chip, each read once: bf16 and fp16 logits. They are built
where nvcc is found (see setup.py), GPU or not.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sadkern.backends.kernels import (
    addressed,
    addresses,
    contiguous,
    empty_values,
    refuses,
    rows_of,
)
from sadkern.backends.reference import RowValues, empty, scale_
from sadkern.sides import TopK, empty_topk

__all__ = ["divergence_rows", "empty", "longest", "scale_", "serves", "topk_rows"]

DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16"}

_CUDA: ModuleType | None
try:
    _CUDA = import_module("sadkern._cuda")
except ImportError as error:
    _CUDA = None
    _import_error = str(error)


LONGEST_PART, MOST_BLOCKS = 32768, 8  # as csrc/cuda/launch.h has them


def missing() -> str:
    """Why the kernels are not there; empty where they are."""
    return "" if _CUDA else f"the CUDA kernels were not built ({_import_error})"


def core() -> Any:
    """The compiled module itself."""
    if _CUDA is None:
        raise RuntimeError(missing())
    return _CUDA


def built() -> str:
    """By which nvcc, and for what chips."""
    return getattr(_CUDA, "nvcc", "for tests, on the CPU")


def serves(dtype: torch.dtype, device: torch.device) -> Exception | None:
    """None where this backend can take such logits, else the error that says why not."""
    if _CUDA is None:
        return RuntimeError(
            f"backend='cuda': {missing()}. nvcc and `SADKERN_CUDA=1 pip install --force-reinstall "
            "sadkern` build them."
        )
    if (device.type == "cuda") != hasattr(_CUDA, "nvcc"):
        return RuntimeError(f"backend='cuda' serves tensors on NVIDIA GPUs, got device {device}")
    return refuses("cuda", dtype, DTYPES)


def longest(device: torch.device) -> int:
    """Entries of the longest row that fits: from sm_90 on blocks of threads can share one."""
    clusters = device.type != "cuda" or torch.cuda.get_device_capability(device) >= (9, 0)
    return LONGEST_PART * (MOST_BLOCKS if clusters else 1)


def divergence_rows(
    student: Tensor,  # [..., V_s]
    teacher: Tensor | TopK,  # [..., V_t]
    supervised: Tensor,  # [...] bool
    row_weights: Tensor,  # [...] fp32
    labels: Tensor | None,  # [...] int64
    dstudent: Tensor | None,  # [..., V_s], may be the student itself
    *,
    divergence: str,
    mix: float,
    temperature: float,
    ce_weight: float,
    tail: str = "bucket",
    softcap: float = 0.0,
) -> RowValues:
    """As `reference.divergence_rows`, of full distributions. ValueError: a row does not fit."""
    if isinstance(teacher, TopK):
        raise ValueError("backend='cuda' takes full teachers, got a TopK: expected triton or auto")
    sizes = student.shape[:-1]
    values = empty_values(sizes, student.device)
    s, t = addressed(student), addressed(teacher)
    d = s if dstudent is None or dstudent is student else addressed(dstudent)
    _call(
        "span_kl",
        s,
        rows=sizes.numel(),
        vocab=min(s.shape[-1], t.shape[-1]),
        student_vocab=s.shape[-1],
        dtype=DTYPES[s.dtype],
        student=_rows(s),
        teacher=_rows(t),
        dstudent=(0, 1, 0, 0) if dstudent is None else _rows(d),
        supervised=supervised.contiguous(),
        row_weights=row_weights.contiguous(),
        labels=contiguous(labels),
        divergence=divergence,
        mix=mix,
        inv_temperature=1 / temperature,
        ce_weight=ce_weight,
        inv_softcap=1 / softcap if softcap else 0.0,
        per_token=values.per_token,
        cross_entropy=values.cross_entropy,
        teacher_entropy=values.teacher_entropy,
        agreement=values.agreement,
    )
    if dstudent is not None and d is not dstudent:
        dstudent.copy_(d)
    return values


def topk_rows(logits: Tensor, k: int, temperature: float) -> TopK:
    """As `reference.topk_rows`. ValueError: a row, or k, does not fit."""
    sizes = logits.shape[:-1]
    found = empty_topk(logits, sizes, k, torch.float32)
    x = addressed(logits)
    _call(
        "topk",
        x,
        rows=sizes.numel(),
        vocab=x.shape[-1],
        dtype=DTYPES[x.dtype],
        logits=_rows(x),
        k=k,
        inv_temperature=1 / temperature,
        **vars(found),
    )
    return found


def _call(kernel: str, at: Tensor, **arguments: Any) -> None:
    """On the current stream of that tensor's device, which the launch leaves current."""
    where = {"device": 0, "stream": 0}
    if at.is_cuda:
        stream = torch.cuda.current_stream(at.device).cuda_stream
        where = {"device": at.get_device(), "stream": stream}
    with torch.cuda.device_of(at):
        getattr(core(), kernel)(**addresses(arguments), **where)


def _rows(logits: Tensor) -> tuple[int, int, int, int]:
    return logits.data_ptr(), *rows_of(logits)
