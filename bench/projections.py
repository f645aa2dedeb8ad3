"""A loss from hidden states and heads: its inputs and who takes part, on any device.

Forward KL between two projections, the mean over supervised rows, with its gradients of the
student's hidden states and head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.common import Run
from sadkern import Projection, span_kl


@dataclass
class Inputs:
    """Both sides' hidden states [N, D] and heads [V, D]; of the student's a gradient is wanted."""

    hidden: Tensor
    weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    span_ids: Tensor  # [N]

    def __post_init__(self) -> None:
        self.rows = self.span_ids.nonzero().squeeze(-1)
        self.leaves = [self.hidden.requires_grad_(), self.weight.requires_grad_()]

    def double(self) -> Inputs:
        """The same in float64."""
        return Inputs(
            self.hidden.detach().double(),
            self.weight.detach().double(),
            self.teacher_hidden.double(),
            self.teacher_weight.double(),
            self.span_ids,
        )

    def reset(self) -> None:
        for leaf in self.leaves:
            leaf.grad = None


def inputs(
    rows: int,
    vocab: int,
    widths: tuple[int, int],
    supervised: float,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Inputs:
    """At random; `widths` are D of student and teacher, `supervised` the share of the rows."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(count: int, width: int, scale: float = 1.0) -> Tensor:
        made = torch.empty(count, width, dtype=dtype, device=device)
        return made.normal_(0, scale, generator=generator)

    student, teacher = widths
    chosen = torch.randperm(rows, generator=generator, device=device)[: round(supervised * rows)]
    span_ids = torch.zeros(rows, dtype=torch.int64, device=device)
    span_ids[chosen] = 1 + torch.arange(len(chosen), device=device) % 2
    return Inputs(
        normal(rows, student),
        normal(vocab, student, 2 / student**0.5),
        normal(rows, teacher),
        normal(vocab, teacher, 2 / teacher**0.5),
        span_ids,
    )


def ours(x: Inputs, **options: Any) -> Run:
    def run() -> None:
        student = Projection(x.hidden, x.weight)
        teacher = Projection(x.teacher_hidden, x.teacher_weight)
        out = span_kl(student, teacher, x.span_ids, reduction="token_mean", **options)
        out.loss.backward()

    return run


def eager(x: Inputs) -> Run:
    """PyTorch, logits of all rows."""

    def run() -> None:
        logq = F.log_softmax(x.hidden @ x.weight.t(), -1)
        logp = F.log_softmax(x.teacher_hidden @ x.teacher_weight.t(), -1)
        kl = F.kl_div(logq, logp, reduction="none", log_target=True).sum(-1)
        ((kl * (x.span_ids != 0)).sum() / len(x.rows)).backward()

    return run


def on_rows(x: Inputs, loss: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> Run:
    """A loss of supervised rows alone."""

    def run() -> None:
        hidden, teacher_hidden = x.hidden[x.rows], x.teacher_hidden[x.rows]
        loss(hidden, x.weight, teacher_hidden, x.teacher_weight).backward()

    return run


def eager_rows(x: Inputs) -> Run:
    """PyTorch, logits of supervised rows, each side's gone when their logarithms are there."""

    def of_rows(hidden: Tensor, weight: Tensor, theirs: Tensor, their_weight: Tensor) -> Tensor:
        logq = F.log_softmax(hidden @ weight.t(), -1)
        logp = F.log_softmax(theirs @ their_weight.t(), -1)
        return F.kl_div(logq, logp, reduction="batchmean", log_target=True)

    return on_rows(x, of_rows)


def _liger(compiled: bool) -> Any:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    return LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=compiled
    )


def liger(x: Inputs) -> Run:
    """All rows, as its trainer gives them; labels say which count. Not compiled, for CPUs."""
    loss, labels = _liger(compiled=False), torch.where(x.span_ids != 0, 0, -100)
    sides = x.hidden, x.weight, x.teacher_hidden, x.teacher_weight
    return lambda: loss(*sides, labels).backward()


def liger_rows(x: Inputs) -> Run:
    loss, labels = _liger(compiled=True), torch.zeros_like(x.rows)
    return on_rows(x, lambda *sides: loss(*sides, labels))


def trl_rows(x: Inputs) -> Run:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction as Chunked

    return on_rows(x, lambda h, w, *of: Chunked.apply(h, w, None, *of, None, 0.0)[0].mean())


def four_products(x: Inputs) -> Run:
    """The products alone, into memory that is there: what no implementation undercuts."""
    hidden, weight = x.hidden.detach()[x.rows], x.weight.detach()
    teacher_hidden = x.teacher_hidden[x.rows]
    student, teacher = (hidden.new_zeros(len(hidden), len(weight)) for _ in range(2))
    dhidden, dweight = torch.zeros_like(hidden), torch.zeros_like(weight)

    def run() -> None:
        torch.mm(hidden, weight.t(), out=student)
        torch.mm(teacher_hidden, x.teacher_weight.t(), out=teacher)
        torch.mm(student, weight, out=dhidden)
        torch.mm(student.t(), hidden, out=dweight)

    return run
