"""The public function: a divergence per span between student and teacher, with its gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sadkern import ops
from sadkern.reduction import REDUCTIONS

DIVERGENCES = (
    "forward_kl",
    "reverse_kl",
    "jsd",
    "skew_forward_kl",
    "skew_reverse_kl",
    "tvd",
)


@dataclass(frozen=True)
class SpanLoss:
    """What `span_kl` returns. Only `loss` carries a gradient; all else is a detached by-product.

    S is the number of spans, `...` the leading shape of the logits; everything is fp32 (fp64 for
    fp64 logits) but where noted, in nats, and 0 in rows that are not supervised.
    """

    loss: Tensor
    """[]: `sum_s span_weights[s] span_loss[s]`"""
    span_loss: Tensor
    """[S]: each span's reduced divergence (plus `ce_weight` times its cross-entropy), unweighted"""
    span_count: Tensor
    """[S] int64: supervised rows of each span"""
    per_token: Tensor
    """[...]: each row's divergence"""
    cross_entropy: Tensor
    """[...]: each row's cross-entropy to its hard label, at temperature 1; 0 without labels"""
    teacher_entropy: Tensor
    """[...]: entropy of the teacher at `temperature`"""
    agreement: Tensor
    """[...] bool: student and teacher have the same most likely token"""


def span_kl(
    student: Tensor,
    teacher: Tensor,
    span_ids: Tensor,
    *,
    span_weights: Sequence[float] = (1.0, 1.0),
    divergence: str = "forward_kl",
    beta: float = 0.5,
    skew: float = 0.1,
    temperature: float = 1.0,
    reduction: str = "span_mean",
    num_tokens: float | Sequence[float] | Tensor | None = None,
    token_weights: Tensor | None = None,
    labels: Tensor | None = None,
    ce_weight: float = 0.0,
    inplace: bool = False,
    backend: str = "auto",
) -> SpanLoss:
    """Divergence between the next-token distributions of a student and a teacher, span by span.

    With q = softmax(student / temperature) and p = softmax(teacher / temperature), row i of span s
    contributes its divergence D_i, and

        loss = sum_s span_weights[s] * sum_{i in s} token_weights_i (D_i + ce_weight CE_i) / n_s

    which are equations (4) to (6) of *Structured Agent Distillation for Large Language Model* for
    `forward_kl` and `reduction="sum"`, and (13) for `ce_weight`. Loss and gradient come out of one
    pass over the logits; rows with `span_ids == 0` are neither read nor given a gradient.

    Args:
        student: logits `[..., V]`, fp32, bf16 or fp16 (fp64: on the reference backend).
        teacher: logits `[..., V']` of the same leading shape, dtype and device. Where V and V'
            differ (padded vocabularies) the common prefix is compared, as if the rest were -inf.
        span_ids: integers `[...]`: 0 not supervised, 1 REASON, 2 ACT, up to `len(span_weights)`.
            They belong to rows, and row p predicts token p + 1.
        span_weights: one weight per span.
        divergence: `forward_kl` KL(p||q), `reverse_kl` KL(q||p), `jsd` (of `beta`; 0 is forward
            and 1 reverse KL, as in TRL), `skew_forward_kl` KL(p || skew p + (1 - skew) q),
            `skew_reverse_kl` KL(q || skew q + (1 - skew) p) or `tvd` sum |p - q| / 2.
        beta: the teacher's share of the mixture of `jsd`, in [0, 1].
        skew: in [0, 1].
        temperature: divides both sides' logits. The loss is not multiplied by its square.
        reduction: `span_mean` (n_s the supervised rows of span s), `token_mean` (n_s those of all
            spans together) or `sum` (n_s = 1).
        num_tokens: n_s in place of this call's own counts: S numbers for `span_mean`, one for
            `token_mean`. With the counts of a whole batch, the gradients of its parts add up to the
            batch's own.
        token_weights: `[...]`, a factor of each row.
        labels: int64 `[...]`, the hard target of each row (that is token p + 1), -100 for none.
        ce_weight: factor of the cross-entropy to `labels`, taken at temperature 1.
        inplace: the gradient is written over the student's logits, which are then gone: their
            version counter says so to autograd.
        backend: `auto` (the compiled kernels for fp32, bf16 and fp16 on the CPU, else the
            reference), `native` or `reference`.

    Returns:
        A `SpanLoss`. An empty span contributes 0, and so does an empty batch.

    Raises:
        ValueError: shapes, dtypes, devices or values that do not fit, a teacher that requires a
            gradient; the message says what was got and what was expected.
        RuntimeError: `backend` names one that is missing here.

    Example:
        >>> import torch
        >>> from sadkern import span_kl
        >>> student = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 0.0]], requires_grad=True)
        >>> teacher = torch.tensor([[0.0, 0.0], [0.0, 1.0], [9.0, 0.0]])
        >>> out = span_kl(student, teacher, torch.tensor([1, 2, 0]))
        >>> [round(x, 4) for x in out.span_loss.tolist()]  # KL of REASON and of ACT
        [0.0, 0.4621]
        >>> out.loss.backward()
        >>> student.grad[2].tolist()  # not supervised
        [0.0, 0.0]
    """
    _check(student, teacher, span_ids, token_weights, labels)
    divergence, mix = _canonical(divergence, beta, skew)
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction={reduction!r}: expected one of {', '.join(REDUCTIONS)}")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature={temperature}: expected a positive number")
    weights = [float(weight) for weight in span_weights]
    if not weights or not all(0 <= weight < float("inf") for weight in weights):
        raise ValueError(f"span_weights={weights}: expected numbers >= 0, one per span")
    if ce_weight and labels is None:
        raise ValueError(f"ce_weight={ce_weight} but labels is None: expected labels [...]")
    counts = _num_tokens(num_tokens, len(weights), reduction, student.device)

    wants_gradient = student.requires_grad and torch.is_grad_enabled()
    logits = student.detach()
    arguments = (
        teacher, span_ids, token_weights, labels, counts, weights, divergence, mix,
        float(temperature), reduction, float(ce_weight),
    )  # fmt: skip
    if inplace:
        _check_inplace(student)
        loss, *rest = ops.span_kl_(logits, backend, *arguments)
        dstudent = logits
    else:
        loss, *rest, dstudent = ops.span_kl(logits, backend, wants_gradient, *arguments)
    if wants_gradient:
        loss = ops.with_gradient(loss, [student], [dstudent])
    return SpanLoss(loss, *rest)


def _canonical(divergence: str, beta: float, skew: float) -> tuple[str, float]:
    """The divergence and its one parameter; the ends of `beta` and `skew` are plain KLs."""
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence={divergence!r}: expected one of {', '.join(DIVERGENCES)}")
    if divergence == "jsd":
        if not 0 <= beta <= 1:
            raise ValueError(f"beta={beta}: expected a number in [0, 1]")
        if beta in (0, 1):
            return ("reverse_kl" if beta else "forward_kl"), 0.0
        return divergence, float(beta)
    if divergence.startswith("skew"):
        if not 0 <= skew <= 1:
            raise ValueError(f"skew={skew}: expected a number in [0, 1]")
        if skew == 0:
            return divergence.removeprefix("skew_"), 0.0
        return divergence, float(skew)
    return divergence, 0.0


def _num_tokens(
    given: float | Sequence[float] | Tensor | None,
    num_spans: int,
    reduction: str,
    device: torch.device,
) -> Tensor | None:
    if given is None:
        return None
    if reduction == "sum":
        raise ValueError(
            "num_tokens is given but reduction='sum' divides by nothing: expected None"
        )
    counts = torch.as_tensor(given, dtype=torch.float64).to(device).reshape(-1)
    expected = num_spans if reduction == "span_mean" else 1
    if counts.numel() != expected:
        raise ValueError(
            f"num_tokens has {counts.numel()} numbers, expected {expected} for "
            f"reduction={reduction!r} and {num_spans} spans"
        )
    return counts


def _check(
    student: Tensor,
    teacher: Tensor,
    span_ids: Tensor,
    token_weights: Tensor | None,
    labels: Tensor | None,
) -> None:
    for name, logits in (("student", student), ("teacher", teacher)):
        if not isinstance(logits, Tensor):
            raise ValueError(f"{name} is a {type(logits).__name__}, expected logits: a Tensor")
        if not logits.dtype.is_floating_point:
            raise ValueError(f"{name} has dtype {logits.dtype}, expected floating-point logits")
        if logits.ndim == 0 or logits.shape[-1] == 0:
            raise ValueError(f"{name} has shape {list(logits.shape)}, expected [..., V] with V > 0")
    if teacher.requires_grad:
        raise ValueError(
            "teacher requires a gradient, but span_kl trains the student alone: "
            "expected teacher.detach(), or the teacher's forward under torch.no_grad()"
        )
    if student.dtype != teacher.dtype:
        raise ValueError(
            f"student is {student.dtype} and teacher {teacher.dtype}, expected one dtype: "
            f"teacher.to({student.dtype})"
        )
    rows = student.shape[:-1]
    if teacher.shape[:-1] != rows:
        raise ValueError(
            f"teacher has shape {list(teacher.shape)}, expected {[*rows, 'V']} as the student's"
        )
    if span_ids.dtype.is_floating_point or span_ids.dtype in (torch.bool, torch.complex64):
        raise ValueError(f"span_ids has dtype {span_ids.dtype}, expected integers")
    if labels is not None and labels.dtype != torch.int64:
        raise ValueError(f"labels has dtype {labels.dtype}, expected torch.int64")
    per_row = {"span_ids": span_ids, "token_weights": token_weights, "labels": labels}
    for name, tensor in per_row.items():
        if tensor is not None and tensor.shape != rows:
            raise ValueError(
                f"{name} has shape {list(tensor.shape)}, expected {list(rows)}: one per row"
            )
    for name, tensor in {"teacher": teacher, **per_row}.items():
        if tensor is not None and tensor.device != student.device:
            raise ValueError(
                f"{name} is on {tensor.device}, expected {student.device} as the student"
            )


def _check_inplace(student: Tensor) -> None:
    if student.is_leaf and student.requires_grad:
        raise ValueError(
            "inplace=True would overwrite a leaf that requires a gradient: expected the output of "
            "a model, or inplace=False"
        )
    dimensions = zip(student.stride(), student.shape, strict=True)
    if any(stride == 0 and size > 1 for stride, size in dimensions):
        raise ValueError(
            "inplace=True needs rows with memory of their own, got an expanded student: "
            "expected student.contiguous(), or inplace=False"
        )
