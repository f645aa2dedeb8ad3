"""The optional trajectory-level term: a trajectory's reasoning belongs to its own actions."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def span_contrast(
    hidden: Tensor, kinds: Tensor, sequences: Tensor, temperature: float = 0.1
) -> Tensor:
    """In-batch InfoNCE between the pooled [REASON] and [ACT] states of each trajectory.

    With r_i and a_i the means of the hidden states of trajectory i's REASON and ACT rows, of length
    1, and l_ij = r_i a_j / temperature:

        (mean_i -log softmax_j(l_ij)[i] + mean_i -log softmax_j(l_ji)[i]) / 2

    over the trajectories that have both. The paper names such a term and gives no formula; this one
    needs no teacher. 0 where fewer than two trajectories have both.

    Args:
        hidden: the student's, of supervised rows, `[M, D]`. kinds: `[M]`, 1 REASON and 2 ACT.
        sequences: `[M]`, which trajectory of the batch a row is of.

    >>> import torch
    >>> from sadkern.train.contrast import span_contrast
    >>> hidden = torch.eye(2)[[0, 0, 1, 1]]
    >>> span_contrast(hidden, torch.tensor([1, 2, 1, 2]), torch.tensor([0, 0, 1, 1])).item() < 1e-4
    True
    """
    which, place = torch.unique(sequences, return_inverse=True)
    states = hidden if hidden.dtype == torch.float64 else hidden.float()
    pooled, counts = [], []
    for kind in (1, 2):
        member = (kinds == kind).to(states.dtype)
        sums = states.new_zeros(len(which), states.shape[1])
        pooled.append(sums.index_add(0, place, states * member[:, None]))
        counts.append(states.new_zeros(len(which)).index_add(0, place, member))
    both = (counts[0] > 0) & (counts[1] > 0)
    if int(both.sum()) < 2:
        return states.sum() * 0
    # The mean and the sum have one direction.
    reason, act = (functional.normalize(sums[both], dim=-1) for sums in pooled)
    logits = reason @ act.T / temperature
    own = torch.arange(len(logits), device=logits.device)
    return (functional.cross_entropy(logits, own) + functional.cross_entropy(logits.T, own)) / 2
