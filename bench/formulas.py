"""What one would write in PyTorch: the formulas that kernels are compared and compete with, and the
rule by which they are compared."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from sadkern import Projection, TopK


def divergence_of_logs(lq: Tensor, lp: Tensor, name: str, mix: float) -> Tensor:
    """[...]: of log-probabilities [..., V], which need not sum to 1; `mix` is beta or skew."""
    q, p = lq.exp(), lp.exp()

    def kl(x: Tensor, lx: Tensor, ly: Tensor) -> Tensor:
        return torch.where(x > 0, x * (lx - ly), torch.zeros_like(x)).sum(-1)

    if name == "forward_kl":
        return kl(p, lp, lq)
    if name == "reverse_kl":
        return kl(q, lq, lp)
    if name == "tvd":
        return 0.5 * (p - q).abs().sum(-1)
    share = mix if name != "skew_reverse_kl" else 1 - mix  # of p in the mixture
    lm = torch.logaddexp(lp + math.log(share), lq + math.log(1 - share))
    if name == "jsd":
        return mix * kl(p, lp, lm) + (1 - mix) * kl(q, lq, lm)
    return kl(p, lp, lm) if name == "skew_forward_kl" else kl(q, lq, lm)


def logits_in_torch(side: Tensor | Projection) -> Tensor:
    """[..., V] of logits or of a Projection, as a model's head makes them."""
    if isinstance(side, Tensor):
        return side
    out = side.scale * F.linear(side.hidden, side.weight, side.bias)
    return out if side.softcap is None else side.softcap * torch.tanh(out / side.softcap)


def coarse_in_torch(lq: Tensor, teacher: TopK, tail: str) -> tuple[Tensor, Tensor]:
    """(lq, lp) [..., K + 1] of a TopK teacher's buckets, or [..., K] for `tail="none"`."""
    ids, lp = teacher.ids.long(), teacher.logprobs.to(lq.dtype)
    if tail == "renormalize":
        lp = lp.log_softmax(-1)
    if tail == "none":
        return lq.gather(-1, ids), lp
    outside = lq.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    mass = 1 - lp.exp().sum(-1) if teacher.tail_mass is None else teacher.tail_mass.to(lq.dtype)
    lp_tail = (
        torch.full_like(outside, -torch.inf) if tail == "renormalize" else mass.log()[..., None]
    )
    return torch.cat([lq.gather(-1, ids), outside], -1), torch.cat([lp, lp_tail], -1)


def eager(
    student: Tensor, teacher: Tensor, divergence: str = "forward_kl", beta: float = 0.5
) -> Tensor:
    """[]: the mean over rows of logits [N, V], of forward KL or JSD, as one writes it."""

    def kl(of: Tensor, to: Tensor) -> Tensor:
        return F.kl_div(to, of, reduction="batchmean", log_target=True)

    lq, lp = F.log_softmax(student, -1), F.log_softmax(teacher, -1)
    if divergence == "forward_kl":
        return kl(lp, lq)
    lm = torch.logaddexp(lq + math.log(1 - beta), lp + math.log(beta))
    return beta * kl(lp, lm) + (1 - beta) * kl(lq, lm)


def eager_topk(student: Tensor, teacher: TopK) -> Tensor:
    """[]: mean forward KL over the teacher's tokens and a bucket of all others."""
    lq, lp = coarse_in_torch(F.log_softmax(student, -1), teacher, "bucket")
    return (lp.exp() * (lp - lq)).sum(-1).mean()


def assert_as_precise(
    got: Tensor,
    exact: Tensor,
    plain: Tensor,
    dtype: torch.dtype | None = None,
    *,
    what: str = "",
    least: float = 1.0,
) -> None:
    """The precision rule: an error of at most twice PyTorch's at the same dtype, and a rounding.

    Args:
        got: what is put to the test, on any device.
        exact: the same in float64.
        plain: the same in plain PyTorch, computed in the dtype that `got` was.
        dtype: in which the result was stored, if not that of `got`.
        what: the result's name.
        least: the unit of rounding is that of the largest exact result, or of `least`.

    Raises:
        AssertionError: the largest error is larger, or `got` is not as infinite as `exact`.
    """
    eps, got = torch.finfo(dtype or got.dtype).eps, got.double().to(exact.device)
    finite, what = exact.isfinite(), what or "result"
    assert torch.equal(got[~finite], exact[~finite]), f"{what}: not as infinite as exact"
    if not finite.any():
        return
    got, exact, plain = got[finite], exact[finite], plain[finite].double()
    error = (got - exact).abs().max().item()
    torchs = (plain - exact).abs().nan_to_num(0, 0, 0).max().item()
    rounding = eps * max(least, exact.abs().max().item())
    assert error <= 2 * torchs + rounding, (
        f"{what}: error {error:.2e}, PyTorch's {torchs:.2e}, a rounding {rounding:.2e}"
    )
