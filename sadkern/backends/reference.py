"""The definition: every formula in plain PyTorch, in the rows' own precision but at least fp32.

Slow, and holding several row-wide temporaries; the kernels are these formulas made fast.
"""

from __future__ import annotations

import torch
from torch import Tensor


def serves(student: Tensor) -> None:
    """Any device, any floating dtype."""


def empty_gradient(student: Tensor) -> Tensor:
    """Uninitialised memory for the gradient of `student`, contiguous."""
    return torch.empty_like(student, memory_format=torch.contiguous_format)


def divergence_rows(
    student: Tensor,  # [..., V_s]
    teacher: Tensor,  # [..., V_t]
    supervised: Tensor,  # [...] bool
    row_weights: Tensor,  # [...] fp32 or fp64
    labels: Tensor | None,  # [...] int64
    dstudent: Tensor | None,  # [..., V_s], may be the student itself
    *,
    divergence: str,
    mix: float,
    temperature: float,
    ce_weight: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Per row: divergence, cross-entropy, teacher entropy, top-1 agreement; each [...], 0 where not
    supervised. Fills `dstudent` with the gradient of
    `sum_i row_weights_i (divergence_i + ce_weight cross_entropy_i)`.
    """
    wide = torch.promote_types(student.dtype, torch.float32)
    vocab = min(student.shape[-1], teacher.shape[-1])
    raw = student[supervised][:, :vocab].to(wide)  # [M, V]
    s, t = raw / temperature, teacher[supervised][:, :vocab].to(wide) / temperature
    lq, lp = s.log_softmax(-1), t.log_softmax(-1)

    value, gradient = _divergence(divergence, lp, lq, mix)
    gradient = gradient / temperature
    cross_entropy = torch.zeros_like(value)
    if labels is not None:
        hard = raw.log_softmax(-1)
        label = labels[supervised]
        known = label >= 0
        picked = label.clamp(min=0).unsqueeze(-1)
        cross_entropy = torch.where(known, -hard.gather(-1, picked).squeeze(-1), cross_entropy)
        dhard = hard.exp().scatter_add(-1, picked, torch.full_like(raw[:, :1], -1.0))
        gradient = gradient + ce_weight * torch.where(known.unsqueeze(-1), dhard, 0.0)

    if dstudent is not None:
        weighted = gradient * row_weights[supervised].to(wide).unsqueeze(-1)
        padded = torch.nn.functional.pad(weighted, (0, student.shape[-1] - vocab))
        dstudent[~supervised] = 0
        dstudent[supervised] = padded.to(dstudent.dtype)

    entropy = -_times_unless_zero(lp.exp(), lp).sum(-1)
    same_top = ((s == s.amax(-1, True)) & (t == t.amax(-1, True))).any(-1)

    def spread(rows: Tensor) -> Tensor:
        return rows.new_zeros(supervised.shape).masked_scatter(supervised, rows)

    return spread(value), spread(cross_entropy), spread(entropy), spread(same_top)


def _times_unless_zero(x: Tensor, y: Tensor) -> Tensor:
    """x y, but 0 where x is: the convention 0 log 0 = 0, also where the logarithm is infinite."""
    return torch.where(x == 0, 0.0, x * y)


def _divergence(name: str, lp: Tensor, lq: Tensor, mix: float) -> tuple[Tensor, Tensor]:
    """Value [M] and gradient [M, V] with respect to the logits of q, from log-probabilities [M, V].

    With g = dD/dq the gradient is `q (g - sum_k q_k g_k)`; below stands q g, whose terms that are
    constant over the vocabulary fall out.
    """
    p, q = lp.exp(), lq.exp()
    rest = 1 - mix
    if name == "forward_kl":
        return _times_unless_zero(p, lp - lq).sum(-1), q - p
    if name == "reverse_kl":
        qg = _times_unless_zero(q, lq - lp)
        value = qg.sum(-1)
    elif name == "jsd":
        lm = _log_mixture(lq, lp, mix)
        qg = rest * _times_unless_zero(q, lq - lm)
        value = (mix * _times_unless_zero(p, lp - lm) + qg).sum(-1)
    elif name == "skew_forward_kl":
        lm = _log_mixture(lq, lp, mix)
        value = _times_unless_zero(p, lp - lm).sum(-1)
        qg = -rest * _times_unless_zero(p, (lq - lm).exp())
    elif name == "skew_reverse_kl":
        lm = _log_mixture(lp, lq, mix)
        kl = _times_unless_zero(q, lq - lm)
        value = kl.sum(-1)
        qg = kl - mix * _times_unless_zero(q, (lq - lm).exp())
    else:
        value = 0.5 * (p - q).abs().sum(-1)
        qg = 0.5 * q * ((q - p).sign() + 0 * (q - p))  # 0 (q - p): NaN stays NaN
    return value, qg - q * qg.sum(-1, keepdim=True)


def _log_mixture(la: Tensor, lb: Tensor, weight_of_b: float) -> Tensor:
    """log((1 - w) a + w b) from log a and log b."""
    weight = torch.tensor([1 - weight_of_b, weight_of_b], dtype=la.dtype, device=la.device).log()
    return torch.logaddexp(la + weight[0], lb + weight[1])
