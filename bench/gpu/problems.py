"""What is put to the test on a GPU, and the same in plain PyTorch.

The formulas are both what kernels are compared with and what they compete with.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.formulas import coarse_in_torch, divergence_of_logs, logits_in_torch
from sadkern import Projection, TopK, span_kl, topk_logprobs
from sadkern.sides import Side, each, slots

BETA, SKEW = 0.5, 0.1
WIDTHS = (48, 64)  # D of the projections that are checked


@dataclass(frozen=True)
class Problem:
    """What `span_kl` is asked: made on the CPU, in the dtype to be tested."""

    student: Tensor | Projection
    teacher: Side
    divergence: str
    options: dict[str, Any] = field(default_factory=dict)  # labels, ce_weight, temperature, tail

    def to(self, to: torch.device | torch.dtype) -> Problem:
        """Elsewhere, or with all its numbers in another dtype."""
        labels = self.options.get("labels")
        if labels is None or isinstance(to, torch.dtype):
            options = self.options
        else:
            options = {**self.options, "labels": labels.to(to)}
        return replace(
            self,
            student=each(self.student, partial(_to, to)),
            teacher=each(self.teacher, partial(_to, to)),
            options=options,
        )

    @property
    def rows(self) -> int:
        tensor = slots(self.student)[0]
        assert tensor is not None
        return tensor.shape[0]


def _to(to: torch.device | torch.dtype, x: Tensor) -> Tensor:
    return x.to(to) if isinstance(to, torch.device) or x.is_floating_point() else x


def span_ids(rows: int, device: torch.device) -> Tensor:
    """[N]: both spans, and every fifth row of none."""
    return torch.arange(1, rows + 1, device=device) % 5 % 3


def leaf(side: Any) -> tuple[Any, list[Tensor]]:
    made = each(side, lambda x: x.detach().clone().requires_grad_())
    return made, [x for x in slots(made) if x is not None]


def found_by(problem: Problem, backend: str) -> dict[str, Tensor]:
    """Values per row and gradients of `span_kl`."""
    student, leaves = leaf(problem.student)
    out = span_kl(
        student, problem.teacher, span_ids(problem.rows, leaves[0].device), reduction="sum",
        divergence=problem.divergence, beta=BETA, skew=SKEW, backend=backend, **problem.options,
    )  # fmt: skip
    out.loss.backward()
    values = {"loss": out.loss.detach(), "value": out.per_token}
    if "labels" in problem.options:
        values["cross-entropy"] = out.cross_entropy
    return values | gradients_of(leaves)


def said_by_torch(problem: Problem) -> dict[str, Tensor]:
    """The same in plain PyTorch. Banned tokens are very unlikely there, not impossible: autograd
    makes NaN of -inf."""

    def possible(x: Tensor) -> Tensor:
        return x.clamp(min=torch.finfo(x.dtype).min / 4) if x.is_floating_point() else x

    student, leaves = leaf(each(problem.student, possible))
    options, temperature = problem.options, problem.options.get("temperature", 1.0)
    raw = logits_in_torch(student)
    lq = (raw / temperature).log_softmax(-1)
    if isinstance(problem.teacher, TopK):
        lq, lp = coarse_in_torch(lq, problem.teacher, options.get("tail", "bucket"))
    else:
        lp = (logits_in_torch(each(problem.teacher, possible)) / temperature).log_softmax(-1)
    supervised = span_ids(problem.rows, raw.device) != 0
    mix = SKEW if problem.divergence.startswith("skew") else BETA
    value = divergence_of_logs(lq, lp, problem.divergence, mix)
    value = torch.where(supervised, value, 0.0)
    values = {"value": value}
    loss = value.sum()
    if "labels" in options:
        hard = F.cross_entropy(raw, options["labels"], reduction="none")
        values["cross-entropy"] = torch.where(supervised, hard, 0.0)
        loss = loss + options["ce_weight"] * values["cross-entropy"].sum()
    loss.backward()
    return {name: x.detach() for name, x in (values | gradients_of(leaves)).items()}


def gradients_of(leaves: list[Tensor]) -> dict[str, Tensor]:
    return {f"gradient {i}": x.grad for i, x in enumerate(leaves) if x.grad is not None}


def logit_pair(kind: str, rows: int, vocab: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Student and teacher [N, V]: unrelated, nearly the same, or with the same tokens banned."""
    generator = torch.Generator().manual_seed(vocab)
    s, t = (3 * torch.randn(rows, vocab, generator=generator) for _ in range(2))
    if kind == "near":
        s = t + 1e-3 * s
    elif kind == "banned":
        banned = torch.rand(rows, vocab, generator=generator) < 0.3
        banned[:, 0] = False
        s, t = s.masked_fill(banned, -torch.inf), t.masked_fill(banned, -torch.inf)
    return s.to(dtype), t.to(dtype)


def logits_problem(
    kind: str, name: str, rows: int, vocab: int, dtype: torch.dtype, labelled: bool = False
) -> Problem:
    options: dict[str, Any] = {}
    if labelled:
        labels = torch.arange(rows) * 7 % vocab
        options = {"labels": labels, "ce_weight": 0.5, "temperature": 1.7}
    return Problem(*logit_pair(kind, rows, vocab, dtype), name, options)


def topk_problem(
    name: str, tail: str, rows: int, vocab: int, dtype: torch.dtype, k: int
) -> Problem:
    student, teacher = logit_pair("random", rows, vocab, dtype)
    likely = topk_logprobs(teacher, min(k, vocab // 2), backend="reference")
    return Problem(student, likely, name, {"tail": tail})


def projection_problem(name: str, rows: int, vocab: int, dtype: torch.dtype) -> Problem:
    generator = torch.Generator().manual_seed(vocab)

    def side(width: int, scale: float, softcap: float | None) -> Projection:
        sizes = ((rows, width), (vocab, width), (vocab,))
        hidden, weight, bias = (torch.randn(*x, generator=generator).to(dtype) for x in sizes)
        return Projection(hidden, weight * (2 / width**0.5), bias, scale, softcap)

    return Problem(side(WIDTHS[0], 0.75, 20.0), side(WIDTHS[1], 1.25, 30.0), name)
