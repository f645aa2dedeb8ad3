"""A divergence from a top-k teacher: one over K + 1 buckets, each of the teacher's tokens and, as
one, all others: the tail. Of a vocabulary that lies on several ranks each has some of the buckets,
and all know the tail.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sadkern.backends.terms import entropy_of, terms_of
from sadkern.sides import TopK


class Buckets:
    """Of rows [C]. Calls come in this order: `close`, with what is known of the student's whole
    rows, `terms`, `whole`, with their sums, and `gradient`."""

    def __init__(self, teacher: TopK, ids: Tensor, vocab: int, dtype: torch.dtype, mode: str):
        """`ids` [C, K]: those of the teacher's that are among the `vocab` tokens here, else -1. An
        entry without an id anywhere is an empty bucket. `mode`: `renormalize` gives all of the
        teacher's mass to its tokens, which leaves its tail 0; `none` leaves the tail's term out of
        the sum."""
        self.here, self.ids, self.mode = ids >= 0, ids.clamp(min=0), mode
        self.given = teacher.ids >= 0
        self.lp = teacher.logprobs.to(dtype).masked_fill(~self.given, -torch.inf)
        self.inside = self._among(self.here, vocab)
        """[C, vocab] bool: the teacher's tokens"""
        self.top = self._among(self.here & (self.lp == self.lp.amax(-1, True)), vocab)
        """[C, vocab] bool: those of them that are likeliest"""
        self.known = self.lp.logsumexp(-1, keepdim=True)
        missing = (1 - self.known.exp()).clamp(min=0).squeeze(-1)
        self.mass = missing if teacher.tail_mass is None else teacher.tail_mass.to(dtype)
        """[C]: the teacher's probability of the tail"""
        self._given_entropy = teacher.entropy

    def _among(self, which: Tensor, vocab: int) -> Tensor:
        counts = self.lp.new_zeros(len(which), vocab)
        return counts.scatter_add(-1, self.ids, which.to(self.lp.dtype)) > 0

    def close(self, lq_tail: Tensor, vocab: int | Tensor) -> None:
        """`lq_tail` [C]: the student's logarithm of the tail, of `vocab` tokens altogether."""
        self.lq_tail, lp_tail = lq_tail, self.mass.log()
        # A student without a tail cannot be infinitely far from a teacher's that is only rounding.
        rounding = (self.mass <= self.lp.shape[-1] * 2.0**-23) | (self.given.sum(-1) == vocab)
        self.lp_tail = lp_tail.masked_fill((lq_tail == -torch.inf) & rounding, -torch.inf)
        if self.mode == "renormalize":
            self.lp = self.lp - self.known
            self.lp_tail = torch.full_like(lp_tail, -torch.inf)
        tail = [] if self.mode == "none" else [self.lp_tail.unsqueeze(-1)]
        entropy = self._given_entropy
        if entropy is None:
            entropy = entropy_of(torch.cat([self.lp, *tail], -1))
        self.entropy = entropy.to(self.lp.dtype)

    def terms(self, divergence: str, mix: float, lq: Tensor) -> tuple[Tensor, Tensor]:
        """Of each bucket but the tail, its share of the value and its q g [C, K]; 0 where it is
        elsewhere. `lq` [C, vocab]: the student's."""
        lp, lq = (x.masked_fill(~self.here, -torch.inf) for x in (self.lp, lq.gather(-1, self.ids)))
        terms, self.qg = terms_of(divergence, lp, lq, mix)
        self.q = lq.exp()
        self.tail_term, self.tail_qg = torch.zeros_like(self.mass), torch.zeros_like(self.mass)
        if self.mode != "none":
            self.tail_term, self.tail_qg = terms_of(divergence, self.lp_tail, self.lq_tail, mix)
        return terms, self.qg

    def whole(self, value: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
        """The two sums over the row, from those of all buckets but the tail."""
        return value + self.tail_term, mean + self.tail_qg

    def gradient(self, lq: Tensor, mean: Tensor) -> Tensor:
        """[C, vocab]; `mean` [C]: the sum of q g over the row."""
        mean, lq_tail = mean.unsqueeze(-1), self.lq_tail.unsqueeze(-1)
        tail = self.tail_qg.unsqueeze(-1) - lq_tail.exp() * mean
        # The tail's is shared by its tokens as its probability is; without any there is none.
        nothing = self.inside | (lq_tail == -torch.inf)
        spread = torch.where(nothing, 0.0, (lq - lq_tail).exp()) * tail
        own = torch.where(self.here, self.qg - self.q * mean, 0.0)
        # NaN anywhere in a row makes all of its gradient so.
        return spread.scatter_add(-1, self.ids, own) + 0 * mean
