"""Tokens drawn from a teacher: a sparse distribution that is right on average."""

from __future__ import annotations

import torch
from torch import Tensor

from sadkern.backends.terms import entropy_of
from sadkern.sides import TopK


def sample_rows(logits: Tensor, n: int, temperature: float, generator: torch.Generator) -> TopK:
    """`n` draws with replacement from each row of `logits` [M, V]; a token's weight is its share of
    them. Heaviest first, equal weights by id; what repeats have left empty is -1, of weight 0."""
    scaled = logits / temperature
    lse, lp = scaled.logsumexp(-1), scaled.log_softmax(-1)
    # A row without a distribution shows in its lse; here it must not stop the others.
    p = torch.where(lse.isfinite().unsqueeze(-1), lp.exp(), 1.0)
    drawn = torch.multinomial(p, n, replacement=True, generator=generator).sort(-1).values
    new = torch.ones_like(drawn, dtype=torch.bool)
    new[:, 1:] = drawn[:, 1:] != drawn[:, :-1]
    place = new.cumsum(-1) - 1  # of each draw among the distinct ones
    count = torch.zeros_like(drawn).scatter_add(-1, place, torch.ones_like(drawn))
    ids = torch.full_like(drawn, -1).scatter(-1, place, drawn)
    order = torch.sort(count, dim=-1, descending=True, stable=True).indices
    return TopK(
        ids.gather(-1, order).to(torch.int32),
        (count.gather(-1, order) / n).to(lp.dtype).log(),
        tail_mass=torch.zeros_like(lp[:, 0]),
        entropy=entropy_of(lp),
        lse=lse,
    )
