"""Rows of which a rank has a part of the vocabulary: the definition of `reference`, in what ranks
must tell one another.

From its part of a row each rank finds a few numbers, the state. With all ranks' states it knows the
normalisers of the whole row, and its own part of the gradient of the plain KLs follows. The other
divergences, and those from a top-k teacher, need two sums over the whole row beside.

A KL over the whole vocabulary is one between the parts' masses P and Q and, within the parts,
one between what is left when a part's own mass is divided out:
KL(p || q) = sum_r P_r (log P_r - log Q_r + KL(p_r || q_r)).
"""

from __future__ import annotations

from collections.abc import Generator

import torch
from torch import Tensor

from sadkern.backends.buckets import Buckets
from sadkern.backends.reference import RowValues, check_distinct
from sadkern.backends.terms import PLAIN, entropy_of, terms_of, times_unless_zero
from sadkern.ranks import Ranks
from sadkern.sides import TopK

# Those that look at the difference of logarithms itself.
CENTRED = ("reverse_kl", "tvd")
State = dict[str, Tensor]


class Shard:
    """Rows [C] of a chunk, all of them supervised."""

    def __init__(
        self,
        ranks: Ranks,
        student: Tensor,  # [C, V_r] logits
        teacher: Tensor | TopK,  # [C, V_r] or [C, K]
        labels: Tensor | None,  # [C] int64
        *,
        divergence: str,
        mix: float,
        temperature: float,
        ce_weight: float,
        tail: str,
        softcap: float,
    ):
        self.raw, self.s = student, _over(student, temperature)
        self.divergence, self.mix, self.temperature = divergence, mix, temperature
        self.ce_weight, self.tail, self.softcap = ce_weight, tail, softcap
        self.ranks = ranks
        self.labels = labels
        self.label = None if labels is None else ranks.among_own(labels)
        self.buckets = None
        if isinstance(teacher, TopK):
            check_distinct(teacher.ids, torch.ones_like(teacher.ids[:, 0], dtype=torch.bool))
            ids = ranks.among_own(teacher.ids.long())
            self.buckets = Buckets(teacher, ids, ranks.own, student.dtype, tail)
        else:
            self.t = _over(teacher, temperature)

    def rows(
        self, row_weights: Tensor, gradient: Tensor | None
    ) -> Generator[None, None, RowValues]:
        """What `divergence_rows` gives and writes. Pauses while its messages are on their way."""
        state = self.state()
        told = self.ranks.gathered(torch.stack([x.to(self.s.dtype) for x in state.values()]))
        yield
        self.merge(dict(zip(state, told().unbind(1), strict=True)))
        sums = self.sums()
        if sums is not None:
            summed = self.ranks.summed(sums)
            yield
            sums = summed()
        return self.finish(sums, row_weights, gradient)

    def state(self) -> State:
        """Of this part [C]."""
        s, raw = self.s, self.raw
        found = _sum("s", s)
        if self.label is not None:
            found |= _sum("h", raw)
            at = raw.gather(-1, self.label.clamp(min=0).unsqueeze(-1)).squeeze(-1)
            found["label"] = at.masked_fill(self.label < 0, -torch.inf)
        at_top = s == found["top_s"].unsqueeze(-1)
        if self.buckets is not None:
            found |= _sum("out", s.masked_fill(self.buckets.inside, -torch.inf))
            found["same"] = (at_top & self.buckets.top).any(-1)
        else:
            found |= _sum("t", self.t)
            lp = _less(self.t, found["top_t"], _finite(found["log_t"]))
            lq = _less(s, found["top_s"], _finite(found["log_s"]))
            found["entropy"] = entropy_of(lp)
            if self.divergence in PLAIN:
                found["kl"] = _terms(self.divergence, lp, lq, 0.0)[0].sum(-1)
            if self.divergence in CENTRED:
                found["t_of_top"] = self.t.masked_fill(~at_top, -torch.inf).amax(-1)
                gap = _gap(s, found["top_s"], self.t, found["t_of_top"])
                found["gap_q"] = times_unless_zero(lq.exp(), gap).sum(-1)
                found["gap_p"] = times_unless_zero(lp.exp(), gap).sum(-1)
            found["same"] = (at_top & (self.t == found["top_t"].unsqueeze(-1))).any(-1)
        return found

    def merge(self, parts: State) -> None:
        """Takes all ranks' states [R, C]."""
        self.top_s, self.log_s, lq = _merged(parts, "s")
        same = (parts["same"] != 0) & (parts["top_s"] == self.top_s)
        if self.buckets is not None:
            top, log, _ = _merged(parts, "out")
            lq_tail = _finite(top) - _finite(self.top_s) + (log - self.log_s)
            self.buckets.close(lq_tail, self.ranks.vocab)
            entropy, mass = self.buckets.entropy, self.buckets.mass
        else:
            self.top_t, self.log_t, lp = _merged(parts, "t")
            same &= parts["top_t"] == self.top_t
            entropy = times_unless_zero(lp.exp(), parts["entropy"] - lp).sum(0)
            mass = torch.zeros_like(entropy)
            if self.divergence in PLAIN:
                side = lp if self.divergence == "forward_kl" else lq
                within = times_unless_zero(side.exp(), parts["kl"])
                self.kl = (_terms(self.divergence, lp, lq, 0.0)[0] + within).sum(0)
            if self.divergence in CENTRED:
                self._centre(parts, lp, lq)
        hard = torch.zeros_like(self.log_s)
        if self.labels is not None:
            self.top_h, self.log_h, _ = _merged(parts, "h")
            away = self.top_h - parts["label"].amax(0)
            hard = torch.where(self.labels >= 0, away + self.log_h, hard)
        self.values = RowValues(hard, hard, entropy, same.any(0), mass)

    def _centre(self, parts: State, lp: Tensor, lq: Tensor) -> None:
        """What the whole row's gaps are centred on, their mean under q, and what they are where
        log q = log p."""
        at_top = parts["top_s"] == self.top_s
        self.t_of_top = parts["t_of_top"].masked_fill(~at_top, -torch.inf).amax(0)
        moved = _gap(parts["top_s"].T, self.top_s, parts["t_of_top"].T, self.t_of_top).T
        self.mean_gap, below = (
            times_unless_zero(x.exp(), parts[name] + moved).sum(0)
            for name, x in (("gap_q", lq), ("gap_p", lp))
        )
        ratio = self.log_s - self.log_t - (self.top_t - _finite(self.t_of_top))
        # Between near distributions the means bracket it, and their midpoint, off by the third
        # power of the gaps only, is free of the normalisers' rounding.
        near = self.mean_gap - below < 1e-5
        self.log_ratio = torch.where(near, (self.mean_gap + below) / 2, ratio)

    def sums(self) -> Tensor | None:
        """Of the value and of q g [2, C] over this part, where the state does not tell them."""
        if self.buckets is not None:
            found = self.buckets.terms(self.divergence, self.mix, self._lq())
        elif self.divergence not in PLAIN:
            found = self._mixture()
        else:
            return None
        return torch.stack([terms.sum(-1) for terms in found])

    def finish(
        self, sums: Tensor | None, row_weights: Tensor, gradient: Tensor | None
    ) -> RowValues:
        """Takes the sums over the whole rows and writes this part of the gradient, over the
        student's logits or elsewhere."""
        buckets = self.buckets
        if buckets is not None:
            assert sums is not None
            value, mean = buckets.whole(*sums)
        else:
            value, mean = (self.kl, self.kl) if sums is None else sums.unbind()
        if gradient is not None:
            gradient.copy_(self._gradient(mean) * row_weights.unsqueeze(-1))
        if buckets is None or self.tail != "none":
            value = value.clamp(min=0)  # rounding only: a divergence is not negative
        return self.values._replace(per_token=value)

    def _mixture(self) -> tuple[Tensor, Tensor]:
        """Shares of the value and q g [C, V_r]."""
        lp, lq = self._lp(), self._lq()
        value, qg = _terms(self.divergence, lp, lq, self.mix)
        if self.divergence == "tvd":
            # Whose sign near p = q has more digits in the gap than in q - p.
            log_ratio = self._gaps() - self.log_ratio.unsqueeze(-1)
            qg = times_unless_zero(lq.exp(), 0.5 * log_ratio.sign()) + 0 * value
        return value, qg

    def _gaps(self) -> Tensor:
        return _gap(self.s, self.top_s, self.t, self.t_of_top)

    def _lp(self) -> Tensor:
        return _less(self.t, self.top_t, self.log_t)

    def _lq(self) -> Tensor:
        return _less(self.s, self.top_s, self.log_s)

    def _gradient(self, mean: Tensor) -> Tensor:
        """[C, V_r] of an unweighted row, with respect to the logits before the softcap."""
        lq = self._lq()
        if self.buckets is not None:
            found = self.buckets.gradient(lq, mean)
        elif self.divergence == "forward_kl":
            found = lq.exp() - self._lp().exp()
        elif self.divergence == "reverse_kl":
            found = times_unless_zero(lq.exp(), self._gaps() - self.mean_gap.unsqueeze(-1))
        else:
            found = self._mixture()[1] - lq.exp() * mean.unsqueeze(-1)
        found = found / self.temperature
        if self.labels is not None and self.label is not None:
            hard = _less(self.raw, self.top_h, self.log_h).exp()
            own = self.label.unsqueeze(-1)
            hard = hard.scatter_add(-1, own.clamp(min=0), (own < 0).to(hard.dtype) - 1)
            known = (self.labels >= 0).unsqueeze(-1)
            found = found + self.ce_weight * torch.where(known, hard, 0.0)
        if self.softcap:
            found = found * (1 - (self.raw / self.softcap) ** 2)
        return found


# Of log sum e^x the largest x is kept apart: what is left has digits that the whole would lack,
# where logits are far from 0.


def _over(logits: Tensor, temperature: float) -> Tensor:
    """Themselves at 1: a tile is large, and there are two chunks of them."""
    return logits if temperature == 1 else logits / temperature


def _finite(x: Tensor) -> Tensor:
    """Of a part in which all tokens are impossible any finite centre makes their exponentials 0."""
    return torch.where(x == -torch.inf, 0.0, x)


def _gap(s: Tensor, top_s: Tensor, t: Tensor, t_of_top: Tensor) -> Tensor:
    """[C, n]: log q - log p but for a constant of the row, chosen so that where q has all of the
    weight the gap is 0 exactly."""
    away = s - _finite(top_s).unsqueeze(-1)
    return away - (t - _finite(t_of_top).unsqueeze(-1))


def _terms(divergence: str, lp: Tensor, lq: Tensor, mix: float) -> tuple[Tensor, Tensor]:
    """As `terms_of`; a KL's with the difference of the two masses, which sums to 0 over the whole
    row and cancels to first order what rounding did to the normalisers."""
    value, qg = terms_of(divergence, lp, lq, mix)
    if divergence.endswith("kl"):
        rest = (1 - mix) * (lq.exp() - lp.exp())
        value = value - rest if "reverse" in divergence else value + rest
    return value, qg


def _less(x: Tensor, top: Tensor, log: Tensor) -> Tensor:
    """The logarithms of the softmax of `x` [C, V_r]."""
    return x - _finite(top).unsqueeze(-1) - log.unsqueeze(-1)


def _sum(name: str, x: Tensor) -> State:
    """Of `x` [C, V_r], its largest and log sum e^(x - the largest)."""
    top = x.amax(-1)
    return {f"top_{name}": top, f"log_{name}": (x - _finite(top).unsqueeze(-1)).logsumexp(-1)}


def _merged(parts: State, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """The same of whole rows [C], and the logarithms of the parts' masses [R, C]."""
    tops, logs = parts[f"top_{name}"], parts[f"log_{name}"]
    top = tops.amax(0)
    logs = _finite(tops) - _finite(top) + logs
    log = logs.logsumexp(0)
    return top, log, logs - log
