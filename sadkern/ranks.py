"""A vocabulary on several ranks: which tokens are whose, and what they tell one another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# (Its name until torch 2.12.)
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

Pending = Callable[[], Tensor]  # waits for the message, and gives it


class Ranks:
    """The ranks of a process group, in whose order the parts of the vocabulary follow each other.

    `teachers`: None of a teacher whose ids are global. Making one waits for a message, so that all
    ranks know, and refuse, the same. ValueError: what they have does not fit together.
    """

    def __init__(
        self, name: str, students: int, teachers: int | None, rows: int, device: torch.device
    ):
        resolve: Any = dist.distributed_c10d._resolve_process_group
        self.group = resolve(name)
        self.count, rank = self.group.size(), self.group.rank()
        told = torch.tensor([students, teachers or students, rows], device=device)
        each = self.gathered(told)().tolist()
        for i, (own, theirs, count) in enumerate(each):
            if count != rows:
                raise ValueError(
                    f"rank {i} has {count} supervised rows and rank {rank} has {rows}, expected "
                    "the same rows on every rank of a group that shares a vocabulary"
                )
            if own != theirs and i != self.count - 1:
                raise ValueError(
                    f"rank {i} of {self.count} has {own} tokens of the student's vocabulary and "
                    f"{theirs} of the teacher's, expected the same tokens of both: only the last "
                    "rank's part may be longer on one side"
                )
        sizes = [min(own, theirs) for own, theirs, _ in each]
        self.begin, self.own, self.most = sum(sizes[:rank]), sizes[rank], max(sizes)
        self.vocab = sum(sizes)

    def gathered(self, x: Tensor) -> Pending:
        """Of `x`, of the same shape on every rank, all of them [R, ...]."""
        out = x.new_empty((self.count * x.shape[0], *x.shape[1:]))
        sent = _all_gather(out, x.contiguous(), group=self.group, async_op=True)

        def wait() -> Tensor:
            if sent is not None:
                sent.wait()
            return out.view(self.count, *x.shape)

        return wait

    def summed(self, x: Tensor) -> Pending:
        """The sum of all ranks' `x`, in its place."""
        sent = dist.all_reduce(x, group=self.group, async_op=True)

        def wait() -> Tensor:
            if sent is not None:
                sent.wait()
            return x

        return wait

    def among_own(self, ids: Tensor) -> Tensor:
        """`ids` of the vocabulary as those of this rank's part; -1 where elsewhere."""
        local = ids - self.begin
        return torch.where((local >= 0) & (local < self.own), local, -1)
