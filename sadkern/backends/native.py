"""The compiled core: C++ kernels for CPU tensors in fp32, bf16 and fp16."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from sadkern.backends import reference

_C: ModuleType | None
try:
    # Not `from sadkern import _C`, which would call a missing module a circular import.
    _C = import_module("sadkern._C")
except ImportError as error:
    _C = None
    _import_error = str(error)

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
# Smaller gradients come from memory that the system's allocator recycles itself.
RECYCLED_BYTES = 4 << 20


def missing() -> str:
    """Why the compiled core is not there; empty where it is."""
    return "" if _C else f"the compiled core is missing ({_import_error})"


def core() -> ModuleType:
    """The compiled module itself."""
    if _C is None:
        raise RuntimeError(missing())
    return _C


def serves(student: Tensor) -> Exception | None:
    """None where this backend can take such logits, else the error that says why not."""
    if _C is None:
        return RuntimeError(
            f"backend='native': {missing()}. A C++17 compiler and "
            "`SADKERN_NATIVE=1 pip install --force-reinstall sadkern` build it."
        )
    if student.device.type != "cpu":
        return RuntimeError(f"backend='native' serves CPU tensors, got device {student.device}")
    if student.dtype not in DTYPES:
        return ValueError(
            f"backend='native' takes {', '.join(DTYPES.values())} logits, got {student.dtype}; "
            "backend='reference' takes any"
        )
    return None


def empty_gradient(student: Tensor) -> Tensor:
    """As `reference.empty_gradient`; large ones of recycled memory, see csrc/cpu/buffer.h."""
    if student.nbytes < RECYCLED_BYTES:
        return reference.empty_gradient(student)
    memory = core().Buffer(student.nbytes)
    gradient = torch.frombuffer(memory, dtype=student.dtype).view(student.shape)
    poisoned = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    if poisoned and torch.are_deterministic_algorithms_enabled():
        gradient.fill_(torch.nan)
    return gradient


def divergence_rows(
    student: Tensor,  # [..., V_s]
    teacher: Tensor,  # [..., V_t]
    supervised: Tensor,  # [...] bool
    row_weights: Tensor,  # [...] fp32
    labels: Tensor | None,  # [...] int64
    dstudent: Tensor | None,  # [..., V_s], may be the student itself
    *,
    divergence: str,
    mix: float,
    temperature: float,
    ce_weight: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `reference.divergence_rows`, each supervised row read once, its gradient written once."""
    sizes = student.shape[:-1]
    per_token, cross_entropy, teacher_entropy = (
        torch.empty(sizes, dtype=torch.float32) for _ in range(3)
    )
    agreement = torch.empty(sizes, dtype=torch.bool)
    flags, weights = supervised.contiguous(), row_weights.contiguous()
    hard = labels.contiguous() if labels is not None else None
    s, t = _unit_stride(student), _unit_stride(teacher)
    d = s if dstudent is student else dstudent
    core().span_kl(
        sizes=list(sizes),
        vocab=min(s.shape[-1], t.shape[-1]),
        student_vocab=s.shape[-1],
        student=_rows(s),
        teacher=_rows(t),
        dstudent=_rows(d) if d is not None else (0, []),
        dtype=DTYPES[s.dtype],
        supervised=flags.data_ptr(),
        row_weights=weights.data_ptr(),
        labels=hard.data_ptr() if hard is not None else 0,
        divergence=divergence,
        mix=mix,
        temperature=temperature,
        ce_weight=ce_weight,
        per_token=per_token.data_ptr(),
        cross_entropy=cross_entropy.data_ptr(),
        teacher_entropy=teacher_entropy.data_ptr(),
        agreement=agreement.data_ptr(),
        threads=torch.get_num_threads(),
    )
    if dstudent is student and s is not student:
        student.copy_(s)
    return per_token, cross_entropy, teacher_entropy, agreement


def _unit_stride(logits: Tensor) -> Tensor:
    """The kernels follow any layout of rows, but the entries of a row must lie side by side."""
    return logits if logits.stride(-1) == 1 or logits.shape[-1] == 1 else logits.contiguous()


def _rows(logits: Tensor) -> tuple[int, list[int]]:
    return logits.data_ptr(), list(logits.stride()[:-1])
