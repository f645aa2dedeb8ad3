"""From rows to spans: counts, row weights and sums; a deterministic second stage on [N].

Two terms that every function here shares: `member` is bool [S, ...], member[s] the rows of
span s + 1; `normaliser` is [S], what a span's sum is divided by.
"""

from __future__ import annotations

import torch
from torch import Tensor

REDUCTIONS = ("span_mean", "token_mean", "sum")


def membership(span_ids: Tensor, num_spans: int) -> Tensor:
    """bool [S, ...]: which rows belong to span 1 .. S."""
    ids = torch.arange(1, num_spans + 1, device=span_ids.device, dtype=span_ids.dtype)
    return span_ids == ids.view(-1, *[1] * span_ids.ndim)


def normaliser(counts: Tensor, num_tokens: Tensor | None, reduction: str) -> Tensor:
    """[S]: the rows of the span, of all spans, or 1; `num_tokens` replaces the counts."""
    if reduction == "sum":
        return torch.ones_like(counts)
    given = counts if num_tokens is None else num_tokens
    return given if reduction == "span_mean" else given.sum().expand_as(counts)


def share(values: Tensor, normaliser: Tensor) -> Tensor:
    """values / normaliser [S], and 0 where a span has no row: never 0 / 0."""
    return torch.where(normaliser > 0, values / normaliser.clamp(min=1e-30), 0.0)


def row_weights(
    member: Tensor, span_weights: Tensor, normaliser: Tensor, token_weights: Tensor | None
) -> Tensor:
    """[...]: the factor with which a row's divergence enters the loss; 0 where not supervised."""
    per_span = share(span_weights, normaliser).view(-1, *[1] * (member.ndim - 1))
    weights = torch.where(member, per_span, 0.0).sum(0)
    return weights if token_weights is None else weights * token_weights.to(weights.dtype)


def span_sums(member: Tensor, values: Tensor) -> Tensor:
    """[S]: sums of `values` [...] over each span; an infinite row stays in its own span."""
    return torch.where(member, values, 0).reshape(len(member), -1).sum(-1)
