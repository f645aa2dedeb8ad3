"""The compiled core: C++ kernels for CPU tensors in fp32, bf16 and fp16."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from math import prod
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sadkern.backends import reference
from sadkern.backends.kernels import DTYPES, addresses, contiguous, empty_values, refuses
from sadkern.backends.reference import RowValues
from sadkern.sides import TopK, empty_topk

_C: ModuleType | None
try:
    # Not `from sadkern import _C`, which would call a missing module a circular import.
    _C = import_module("sadkern._C")
except ImportError as error:
    _C = None
    _import_error = str(error)

scale_ = reference.scale_

# What is smaller comes from memory that the system's allocator recycles itself.
RECYCLED_BYTES = 4 << 20


def missing() -> str:
    """Why the compiled core is not there; empty where it is."""
    return "" if _C else f"the compiled core is missing ({_import_error})"


def core() -> ModuleType:
    """The compiled module itself."""
    if _C is None:
        raise RuntimeError(missing())
    return _C


def serves(dtype: torch.dtype, device: torch.device) -> Exception | None:
    """None where this backend can take such logits, else the error that says why not."""
    if _C is None:
        return RuntimeError(
            f"backend='native': {missing()}. A C++17 compiler and "
            "`SADKERN_NATIVE=1 pip install --force-reinstall sadkern` build it."
        )
    if device.type != "cpu":
        return RuntimeError(f"backend='native' serves CPU tensors, got device {device}")
    return refuses("native", dtype)


def empty(shape: tuple[int, ...] | torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """As `reference.empty`; what is large of recycled memory, see csrc/cpu/buffer.h."""
    nbytes = prod(shape) * dtype.itemsize
    if nbytes < RECYCLED_BYTES:
        return reference.empty(shape, dtype, device)
    memory = torch.frombuffer(core().Buffer(nbytes), dtype=dtype).view(shape)
    poisoned = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    if poisoned and torch.are_deterministic_algorithms_enabled():
        memory.fill_(torch.nan)
    return memory


def divergence_rows(
    student: Tensor,  # [..., V_s]
    teacher: Tensor | TopK,  # [..., V_t] or [..., K]
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
    """As `reference.divergence_rows`, each supervised row read once, its gradient written once."""
    sizes = student.shape[:-1]
    values = empty_values(sizes, student.device)
    s = _unit_stride(student)
    d = s if dstudent is student else dstudent
    rows = {
        "sizes": list(sizes),
        "vocab": s.shape[-1],
        "student_vocab": s.shape[-1],
        "student": _rows(s),
        "dstudent": _rows(d) if d is not None else (0, []),
        "dtype": DTYPES[s.dtype],
        "supervised": supervised.contiguous(),
        "row_weights": row_weights.contiguous(),
        "labels": contiguous(labels),
        "divergence": divergence,
        "mix": mix,
        "temperature": temperature,
        "ce_weight": ce_weight,
        "softcap": softcap,
        "per_token": values.per_token,
        "cross_entropy": values.cross_entropy,
        "teacher_entropy": values.teacher_entropy,
        "agreement": values.agreement,
    }
    if isinstance(teacher, TopK):
        repeated = _call(
            core().span_kl_topk,
            **rows,
            ids=contiguous(teacher.ids, torch.int32),
            logprobs=contiguous(teacher.logprobs, torch.float32),
            tail=contiguous(teacher.tail_mass, torch.float32),
            entropy=contiguous(teacher.entropy, torch.float32),
            k=teacher.ids.shape[-1],
            tail_mode=tail,
            tail_mass=values.tail_mass,
        )
        if repeated >= 0:
            row = tuple(int(i) for i in torch.unravel_index(torch.tensor(repeated), sizes))
            reference.refuse_repeated(row, teacher.ids[row])
    else:
        t = _unit_stride(teacher)
        rows["vocab"] = min(s.shape[-1], t.shape[-1])
        _call(core().span_kl, **rows, teacher=_rows(t))
    if dstudent is student and s is not student:
        student.copy_(s)
    return values


def topk_rows(logits: Tensor, k: int, temperature: float) -> TopK:
    """As `reference.topk_rows`, each row read once."""
    sizes = logits.shape[:-1]
    found = empty_topk(logits, sizes, k, torch.float32)
    x = _unit_stride(logits)
    _call(
        core().topk,
        sizes=list(sizes),
        vocab=x.shape[-1],
        logits=_rows(x),
        dtype=DTYPES[x.dtype],
        k=k,
        temperature=temperature,
        **vars(found),
    )
    return found


def _call(kernel: Callable[..., Any], **arguments: Any) -> Any:
    return kernel(**addresses(arguments), threads=torch.get_num_threads())


def _unit_stride(logits: Tensor) -> Tensor:
    """The kernels follow any layout of rows, but the entries of a row must lie side by side."""
    return logits if logits.stride(-1) == 1 or logits.shape[-1] == 1 else logits.contiguous()


def _rows(logits: Tensor) -> tuple[int, list[int]]:
    return logits.data_ptr(), list(logits.stride()[:-1])
