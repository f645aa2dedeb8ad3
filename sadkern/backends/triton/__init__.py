"""Triton kernels, for NVIDIA GPUs: fp32, bf16 and fp16 logits, everything in one launch.

With `TRITON_INTERPRET=1` in the environment before this is imported, Triton's interpreter runs the
same kernels on CPU tensors: slowly, to test them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sadkern.backends import reference
from sadkern.backends.kernels import (
    MOST_TOKENS,
    addressed,
    contiguous,
    empty_values,
    refuses,
    rows_of,
)
from sadkern.backends.reference import RowValues, empty
from sadkern.backends.triton import plans, row, scale, span_kl, span_kl_topk, topk
from sadkern.sides import TopK, empty_topk

__all__ = ["divergence_rows", "empty", "scale_", "serves", "topk_rows"]

INTERPRETED = row.INTERPRETED.value
# As the interpreter computes: products and sums are rounded each, where a kernel says no other.
OPTIONS = {"enable_fp_fusion": False}


def serves(dtype: torch.dtype, device: torch.device) -> Exception | None:
    """None where this backend can take such logits, else the error that says why not."""
    wrong_dtype = refuses("triton", dtype)
    if wrong_dtype is not None:
        return wrong_dtype
    if INTERPRETED:
        if device.type == "cpu":
            return None
        return RuntimeError(
            f"backend='triton' is interpreted (TRITON_INTERPRET=1) and serves CPU tensors, got "
            f"device {device}: unset it before sadkern is imported"
        )
    if device.type != "cuda" or torch.version.cuda is None:
        return RuntimeError(
            f"backend='triton' serves tensors on NVIDIA GPUs, got device {device}; to test it on "
            "the CPU, set TRITON_INTERPRET=1 in the environment before sadkern is imported"
        )
    capability = plans.capability_of(device)
    if capability < plans.OLDEST:
        return RuntimeError(
            f"backend='triton' needs compute capability {plans.OLDEST} or higher, got {capability}"
        )
    return None


def divergence_rows(
    student: Tensor,  # [..., V_s]
    teacher: Tensor | TopK,  # [..., V_t] or [..., K]
    supervised: Tensor,  # [...] bool
    row_weights: Tensor,  # [...] fp32
    labels: Tensor | None,  # [...] int64
    dstudent: Tensor | None,  # [..., V_s], may be the student itself; of fp32 logits in any dtype
    *,
    divergence: str,
    mix: float,
    temperature: float,
    ce_weight: float,
    tail: str = "bucket",
    softcap: float = 0.0,
) -> RowValues:
    """As `reference.divergence_rows`. On a device nothing waits for it, and so nothing is raised
    for what only the values tell: a wrong id among a teacher's tokens makes its row NaN."""
    sizes, device = student.shape[:-1], student.device
    values = empty_values(sizes, device)
    s = addressed(student)
    d = s if dstudent is None or dstudent is student else addressed(dstudent)
    common: dict[str, Any] = {
        **_rows("student", s),
        **_rows("dstudent", d),
        "supervised": supervised.contiguous().view(torch.uint8),
        "row_weights": row_weights.contiguous(),
        "labels": contiguous(labels),
        "per_token": values.per_token,
        "cross_entropy": values.cross_entropy,
        "teacher_entropy": values.teacher_entropy,
        "agreement": values.agreement.view(torch.uint8),
        "student_vocab": s.shape[-1],
        "mix": mix,
        "inv_temperature": 1 / temperature,
        "ce_weight": ce_weight,
        "inv_softcap": 1 / softcap if softcap else 0.0,
        "DIVERGENCE": divergence,
        "HAS_LABELS": labels is not None,
        "SOFTEN": labels is not None and temperature != 1,
        "HAS_SOFTCAP": softcap != 0,
        "HAS_GRADIENT": dstudent is not None,
    }
    count = sizes.numel()
    if isinstance(teacher, TopK):
        common["tail_mass"] = values.tail_mass
        _span_kl_topk(s, d, teacher, supervised, tail, count, common)
    elif count:
        t = addressed(teacher)
        vocab = min(s.shape[-1], t.shape[-1])
        plan = plans.choose(plans.kind_of(divergence), plans.capability_of(device), vocab, s, t, d)
        _launch(
            span_kl.kernel, count, s, **common, **_rows("teacher", t), vocab=vocab, **plan._asdict()
        )
    if dstudent is not None and d is not dstudent:
        dstudent.copy_(d)
    return values


def _span_kl_topk(
    s: Tensor,
    d: Tensor,
    teacher: TopK,
    supervised: Tensor,
    tail: str,
    count: int,
    common: dict[str, Any],
) -> None:
    k, vocab = teacher.ids.shape[-1], s.shape[-1]
    if k > MOST_TOKENS:  # they are held in registers
        raise ValueError(
            f"teacher.ids has {k} tokens a row, expected at most {MOST_TOKENS} for backend='triton'"
        )
    reference.check_distinct(teacher.ids, supervised)
    if not count:
        return
    plan = plans.choose("span_kl_topk", plans.capability_of(s.device), vocab, s, d, tokens=k)
    programs = min(count, plans.programs_on(s.device, plan.num_warps))
    width = plan.GROUP * plan.TILE  # of marks, too, whole groups are read
    room = -(-vocab // width) * width
    marks = torch.empty((programs, room), dtype=torch.int8, device=s.device)
    _launch(
        span_kl_topk.kernel,
        programs,
        s,
        **common,
        ids=contiguous(teacher.ids, torch.int32),
        logprobs=contiguous(teacher.logprobs, torch.float32),
        given_mass=contiguous(teacher.tail_mass, torch.float32),
        given_entropy=contiguous(teacher.entropy, torch.float32),
        marks=marks,
        n=count,
        k=k,
        room=room,
        vocab=vocab,
        TAIL=tail,
        HAS_MASS=teacher.tail_mass is not None,
        HAS_ENTROPY=teacher.entropy is not None,
        K=max(16, plans.power_of_two(k)),
        **plan._asdict(),
    )


def topk_rows(logits: Tensor, k: int, temperature: float) -> TopK:
    """As `reference.topk_rows`."""
    sizes, vocab, device = logits.shape[:-1], logits.shape[-1], logits.device
    found = empty_topk(logits, sizes, k, torch.float32)
    count = sizes.numel()
    if not count:
        return found
    x = addressed(logits)
    candidates = candidates_of(k)
    plan = plans.choose("topk", plans.capability_of(device), vocab, x, tokens=k)
    programs = min(count, plans.programs_on(device, plan.num_warps))
    _launch(
        topk.kernel,
        programs,
        x,
        **_rows("logits", x),
        **vars(found),
        candidate_ids=torch.empty((programs, candidates), dtype=torch.int32, device=device),
        counters=torch.zeros(programs, dtype=torch.int32, device=device),
        n=count,
        k=k,
        vocab=vocab,
        inv_temperature=1 / temperature,
        CANDIDATES=candidates,
        **plan._asdict(),
    )
    return found


def scale_(gradient: Tensor, factor: Tensor) -> None:
    """As `reference.scale_`: a factor of 1 costs a launch, and the host waits for none."""
    if not gradient.numel():
        return
    x = addressed(gradient)
    width = x.shape[-1]
    plan = plans.choose("scale", plans.capability_of(x.device), width, x)
    _launch(
        scale.kernel,
        x.numel() // width,
        x,
        **_rows("gradient", x),
        factor=factor,
        n=width,
        TILE=plan.TILE,
        STAGES=plan.STAGES,
        num_warps=plan.num_warps,
    )
    if x is not gradient:
        gradient.copy_(x)


def _launch(kernel: Any, programs: int, at: Tensor, **arguments: Any) -> None:
    """On that tensor's device: Triton takes the current one, which may be another."""
    with torch.cuda.device_of(at):
        kernel[(programs,)](**arguments, **OPTIONS)


def candidates_of(k: int) -> int:
    """How many entries the selection sorts."""
    return 2 * max(32, plans.power_of_two(k))


def _rows(name: str, logits: Tensor) -> dict[str, Any]:
    """The arguments of `row.row_pointer`."""
    inner, outer_stride, inner_stride = rows_of(logits)
    return {
        name: logits,
        f"{name}_inner": inner,
        f"{name}_outer": outer_stride,
        f"{name}_stride": inner_stride,
    }
