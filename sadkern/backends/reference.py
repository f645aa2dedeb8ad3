"""The definition: every formula in plain PyTorch, in the rows' own precision but at least fp32.

Slow, and holding several row-wide temporaries; the kernels are these formulas made fast.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sadkern.backends.buckets import Buckets
from sadkern.backends.terms import entropy_of, terms_of
from sadkern.sides import TopK, part_of


class RowValues(NamedTuple):
    """What `divergence_rows` finds of each row [...]; 0 where not supervised."""

    per_token: Tensor
    cross_entropy: Tensor
    teacher_entropy: Tensor
    agreement: Tensor
    tail_mass: Tensor


def serves(dtype: torch.dtype, device: torch.device) -> None:
    """Any device, any floating dtype."""


def empty(shape: tuple[int, ...] | torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised memory for a gradient or a tile, contiguous."""
    return torch.empty(shape, dtype=dtype, device=device)


def divergence_rows(
    student: Tensor,  # [..., V_s]
    teacher: Tensor | TopK,  # [..., V_t] or [..., K]
    supervised: Tensor,  # [...] bool
    row_weights: Tensor,  # [...] fp32 or fp64
    labels: Tensor | None,  # [...] int64
    dstudent: Tensor | None,  # [..., V_s], may be the student itself
    *,
    divergence: str,
    mix: float,
    temperature: float,
    ce_weight: float,
    tail: str = "bucket",
    softcap: float = 0.0,
) -> RowValues:
    """Values per row; fills `dstudent` with the gradient of
    `sum_i row_weights_i (divergence_i + ce_weight cross_entropy_i)`.

    `softcap` c other than 0 says that the student's logits are c tanh(x / c): the gradient is that
    with respect to x.
    """
    wide = torch.promote_types(student.dtype, torch.float32)
    vocab = student.shape[-1]
    if isinstance(teacher, Tensor):
        vocab = min(vocab, teacher.shape[-1])
    raw = student[supervised][:, :vocab].to(wide)  # [M, V]
    s = raw / temperature
    lq = s.log_softmax(-1)

    if isinstance(teacher, TopK):
        value, gradient, entropy, top, mass = _topk(lq, teacher, supervised, divergence, mix, tail)
    else:
        t = teacher[supervised][:, :vocab].to(wide) / temperature
        lp = t.log_softmax(-1)
        value, gradient = _divergence(divergence, lp, lq, mix)
        entropy = entropy_of(lp)
        top = t == t.amax(-1, True)
        mass = torch.zeros_like(value)
    if tail != "none" or isinstance(teacher, Tensor):
        value = value.clamp(min=0)  # rounding only: a divergence is not negative
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
    if softcap:
        gradient = gradient * (1 - (raw / softcap) ** 2)

    if dstudent is not None:
        weighted = gradient * row_weights[supervised].to(wide).unsqueeze(-1)
        padded = torch.nn.functional.pad(weighted, (0, student.shape[-1] - vocab))
        dstudent[~supervised] = 0
        dstudent[supervised] = padded.to(dstudent.dtype)

    same_top = ((s == s.amax(-1, True)) & top).any(-1)

    def spread(rows: Tensor) -> Tensor:
        return rows.new_zeros(supervised.shape).masked_scatter(supervised, rows)

    return RowValues(*map(spread, (value, cross_entropy, entropy, same_top, mass)))


def topk_rows(logits: Tensor, k: int, temperature: float) -> TopK:
    """The k most likely tokens of rows of `logits` [..., V]; equal logits in the order of ids."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    raw = logits.to(wide)
    scaled = raw / temperature
    lp = scaled.log_softmax(-1)
    ids = torch.sort(raw, dim=-1, descending=True, stable=True).indices[..., :k]
    return TopK(
        ids.to(torch.int32),
        lp.gather(-1, ids),
        tail_mass=lp.exp().scatter(-1, ids, 0.0).sum(-1),
        entropy=entropy_of(lp),
        lse=scaled.logsumexp(-1),
    )


def scale_(gradient: Tensor, factor: Tensor) -> None:
    """gradient *= factor []; on the CPU a factor of 1 touches nothing."""
    if factor.device.type != "cpu" or factor.item() != 1:
        gradient.mul_(factor)


def _divergence(name: str, lp: Tensor, lq: Tensor, mix: float) -> tuple[Tensor, Tensor]:
    """Value [M] and gradient [M, V] with respect to the logits of q, from log-probabilities [M, V].

    With g = dD/dq the gradient is `q (g - sum_k q_k g_k)`.
    """
    if name == "forward_kl":
        return terms_of(name, lp, lq, mix)[0].sum(-1), lq.exp() - lp.exp()
    terms, qg = terms_of(name, lp, lq, mix)
    return terms.sum(-1), qg - lq.exp() * qg.sum(-1, keepdim=True)


def _topk(
    lq: Tensor,  # [M, V]
    teacher: TopK,
    supervised: Tensor,  # [...] bool
    divergence: str,
    mix: float,
    mode: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Value [M], gradient [M, V], teacher entropy [M], which tokens are its top [M, V], tail [M]:
    a divergence over buckets."""
    check_distinct(teacher.ids, supervised)
    vocab, rows = lq.shape[-1], supervised.reshape(-1).nonzero().squeeze(-1)
    teacher = part_of(teacher, rows)
    buckets = Buckets(teacher, teacher.ids.long(), vocab, lq.dtype, mode)
    buckets.close(lq.masked_fill(buckets.inside, -torch.inf).logsumexp(-1), vocab)
    value, mean = buckets.whole(*(x.sum(-1) for x in buckets.terms(divergence, mix, lq)))
    gradient = buckets.gradient(lq, mean)
    return value, gradient, buckets.entropy, buckets.top, buckets.mass


def refuse_repeated(row: tuple[int, ...], ids: Tensor) -> None:
    """Raises the ValueError for a row whose `ids` [K] hold one twice."""
    values, counts = ids[ids >= 0].unique(return_counts=True)
    twice = values[counts > 1][0].item()
    raise ValueError(f"teacher.ids{list(row)} holds id {twice} twice, expected distinct ids")


def check_distinct(ids: Tensor, supervised: Tensor) -> None:
    """Raises for supervised rows of `ids` [..., K], on the CPU alone: elsewhere looking would make
    the host wait for the device."""
    if ids.device.type != "cpu":
        return
    ordered = ids[supervised].sort(-1).values
    repeated = ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any(-1)
    if repeated.any():
        at = supervised.nonzero()[repeated.nonzero()[0]].squeeze(0)
        refuse_repeated(tuple(at.tolist()), ids[tuple(at)])
