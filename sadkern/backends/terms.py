"""What each token, or bucket of tokens, adds to a divergence; in plain PyTorch, any precision."""

from __future__ import annotations

import torch
from torch import Tensor

# Those whose gradient needs nothing of the row but its normalisers and its value.
PLAIN = ("forward_kl", "reverse_kl")


def terms_of(name: str, lp: Tensor, lq: Tensor, mix: float) -> tuple[Tensor, Tensor]:
    """Each token's share of the value, and its q g, both [M, V]."""
    p, q = lp.exp(), lq.exp()
    rest = 1 - mix
    if name == "forward_kl":
        return times_unless_zero(p, lp - lq), -p
    if name == "reverse_kl":
        kl = times_unless_zero(q, lq - lp)
        return kl, kl + q
    if name == "jsd":
        lm = log_mixture(lq, lp, mix)
        qg = rest * times_unless_zero(q, lq - lm)
        return mix * times_unless_zero(p, lp - lm) + qg, qg
    if name == "skew_forward_kl":
        lm = log_mixture(lq, lp, mix)
        return times_unless_zero(p, lp - lm), -rest * times_unless_zero(p, (lq - lm).exp())
    if name == "skew_reverse_kl":
        lm = log_mixture(lp, lq, mix)
        kl = times_unless_zero(q, lq - lm)
        return kl, kl + q - mix * times_unless_zero(q, (lq - lm).exp())
    # 0 (q - p): NaN stays NaN
    return 0.5 * (p - q).abs(), 0.5 * q * ((q - p).sign() + 0 * (q - p))


def log_mixture(la: Tensor, lb: Tensor, weight_of_b: float) -> Tensor:
    """log((1 - w) a + w b) from log a and log b."""
    weight = torch.tensor([1 - weight_of_b, weight_of_b], dtype=la.dtype, device=la.device).log()
    return torch.logaddexp(la + weight[0], lb + weight[1])


def times_unless_zero(x: Tensor, y: Tensor) -> Tensor:
    """x y, but 0 where x is: the convention 0 log 0 = 0, also where the logarithm is infinite."""
    return torch.where(x == 0, 0.0, x * y)


def entropy_of(lp: Tensor) -> Tensor:
    """[...]: - sum p log p of log-probabilities [..., V]."""
    return -times_unless_zero(lp.exp(), lp).sum(-1)
