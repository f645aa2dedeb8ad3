"""The torch.library operators: schemas, fakes and autograd, and the only door to the backends.

    sadkern::span_kl        rows -> loss, diagnostics and the gradient, out of place
    sadkern::span_kl_       the same, the gradient over the student's logits
    sadkern::with_gradient  a loss whose gradient is already there: the one autograd rule
    sadkern::scale_         what that rule's backward does

A kernel computes loss and gradient together, so what needs a gradient is not differentiated: it is
attached. Checks that need the values of tensors stand here, since an operator's body runs under
`torch.compile` too.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sadkern import backends, reduction

Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]

# What both forms of the operator take after their own first arguments, and what both give.
ARGUMENTS = (
    "Tensor teacher, Tensor span_ids, Tensor? token_weights, Tensor? labels, Tensor? num_tokens, "
    "float[] span_weights, str divergence, float mix, float temperature, str reduction, "
    "float ce_weight"
)
OUTPUTS = (
    "Tensor loss, Tensor span_loss, Tensor span_count, Tensor per_token, Tensor cross_entropy, "
    "Tensor teacher_entropy, Tensor agreement"
)


@torch.library.custom_op(
    "sadkern::span_kl",
    mutates_args=(),
    schema=f"(Tensor student, str backend, bool with_gradient, {ARGUMENTS})"
    f" -> ({OUTPUTS}, Tensor dstudent)",
)
def span_kl(student: Tensor, backend: str, with_gradient: bool, *arguments: Any) -> Any:
    """`OUTPUTS` and the gradient: of the student's shape, or [0] without one."""
    chosen = backends.choose(backend, student)
    dstudent = chosen.empty_gradient(student) if with_gradient else None
    outputs = _span_kl(chosen, student, dstudent, *arguments)
    return *outputs, student.new_empty(0) if dstudent is None else dstudent


@torch.library.custom_op(
    "sadkern::span_kl_",
    mutates_args=("student",),
    schema=f"(Tensor(a!) student, str backend, {ARGUMENTS}) -> ({OUTPUTS})",
)
def span_kl_(student: Tensor, backend: str, *arguments: Any) -> Any:
    """`OUTPUTS`; the gradient is left in `student`."""
    return _span_kl(backends.choose(backend, student), student, student, *arguments)


def _span_kl(
    backend: ModuleType,
    student: Tensor,  # [..., V]
    dstudent: Tensor | None,  # [..., V]
    teacher: Tensor,  # [..., V']
    span_ids: Tensor,  # [...]
    token_weights: Tensor | None,  # [...]
    labels: Tensor | None,  # [...]
    num_tokens: Tensor | None,  # [S] or [1]
    span_weights: Sequence[float],  # [S]
    divergence: str,
    mix: float,
    temperature: float,
    reduction_name: str,
    ce_weight: float,
) -> Outputs:
    vocab = min(student.shape[-1], teacher.shape[-1])
    check_values(span_ids, len(span_weights), token_weights, labels, vocab)
    wide = torch.promote_types(student.dtype, torch.float32)
    member = reduction.membership(span_ids, len(span_weights))
    counts = reduction.span_sums(member, torch.ones_like(span_ids))
    normaliser = reduction.normaliser(
        counts.to(wide), None if num_tokens is None else num_tokens.to(wide), reduction_name
    )
    per_span = torch.tensor(span_weights, dtype=wide, device=student.device)
    weights = reduction.row_weights(member, per_span, normaliser, token_weights)
    per_token, cross_entropy, entropy, agreement = backend.divergence_rows(
        student,
        teacher,
        span_ids != 0,
        weights,
        labels,
        dstudent,
        divergence=divergence,
        mix=mix,
        temperature=temperature,
        ce_weight=ce_weight,
    )
    values = per_token + ce_weight * cross_entropy if labels is not None else per_token
    if token_weights is not None:
        values = values * token_weights.to(wide)
    span_loss = reduction.share(reduction.span_sums(member, values), normaliser)
    loss = (per_span * span_loss).sum()
    return loss, span_loss, counts, per_token, cross_entropy, entropy, agreement


@span_kl.register_fake
def _(student: Tensor, backend: str, with_gradient: bool, *arguments: Any) -> Any:
    return *_fake_outputs(student, *arguments), student.new_empty(
        student.shape if with_gradient else (0,)
    )


@span_kl_.register_fake
def _(student: Tensor, backend: str, *arguments: Any) -> Any:
    return _fake_outputs(student, *arguments)


def _fake_outputs(student: Tensor, *arguments: Any) -> Outputs:
    wide = torch.promote_types(student.dtype, torch.float32)
    span_weights = arguments[5]
    spans, rows = (len(span_weights),), student.shape[:-1]
    return (
        student.new_empty((), dtype=wide),
        student.new_empty(spans, dtype=wide),
        student.new_empty(spans, dtype=torch.int64),
        student.new_empty(rows, dtype=wide),
        student.new_empty(rows, dtype=wide),
        student.new_empty(rows, dtype=wide),
        student.new_empty(rows, dtype=torch.bool),
    )


def check_values(
    span_ids: Tensor,
    num_spans: int,
    token_weights: Tensor | None,
    labels: Tensor | None,
    vocab: int,
) -> None:
    """Raises ValueError for what only the values tell, naming the first row that is wrong.

    On CPU tensors only: elsewhere looking would make the host wait for the device.
    """
    if span_ids.device.type != "cpu":
        return

    def refuse(wrong: Tensor, name: str, values: Tensor, expected: str) -> None:
        if wrong.any():
            row = wrong.nonzero()[0].tolist()
            raise ValueError(f"{name}{row} is {values[tuple(row)].item()}, expected {expected}")

    outside = (span_ids < 0) | (span_ids > num_spans)
    refuse(outside, "span_ids", span_ids, f"0 to {num_spans}: there are {num_spans} span_weights")
    supervised = span_ids != 0
    if token_weights is not None:
        unusable = supervised & ~token_weights.isfinite()
        refuse(unusable, "token_weights", token_weights, "a finite number")
    if labels is not None:
        unknown = supervised & (labels != -100) & ((labels < 0) | (labels >= vocab))
        refuse(unknown, "labels", labels, f"-100 or 0 to {vocab - 1}, the common vocabulary")


@torch.library.custom_op("sadkern::with_gradient", mutates_args=())
def with_gradient(loss: Tensor, inputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """`loss`, whose derivative with respect to `inputs[i]` is `gradients[i]`."""
    return loss.clone()


@with_gradient.register_fake
def _(loss: Tensor, inputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    return torch.empty_like(loss)


@torch.library.custom_op("sadkern::scale_", mutates_args=("gradient",))
def scale_(gradient: Tensor, factor: Tensor) -> None:
    """gradient *= factor; a factor of 1 on the CPU, the usual case, touches nothing."""
    if factor.device.type != "cpu" or factor.item() != 1:
        gradient.mul_(factor)


@scale_.register_fake
def _(gradient: Tensor, factor: Tensor) -> None:
    return None


def _save(
    ctx: Any, inputs: tuple[Tensor, Sequence[Tensor], Sequence[Tensor]], output: Tensor
) -> None:
    ctx.save_for_backward(*inputs[2])


def _backward(ctx: Any, dloss: Tensor) -> tuple[None, list[Tensor], list[None]]:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "span_kl has no second derivative: its gradient is computed in the forward pass. "
            "Got a backward pass with create_graph=True, expected create_graph=False"
        )
    gradients: Sequence[Tensor] = ctx.saved_tensors
    if torch._C._autograd._get_current_graph_task_keep_graph():
        # retain_graph=True: a later backward pass needs the gradient unscaled.
        return None, [gradient * dloss for gradient in gradients], [None] * len(gradients)
    for gradient in gradients:
        scale_(gradient, dloss)
    return None, list(gradients), [None] * len(gradients)


with_gradient.register_autograd(_backward, setup_context=_save)
