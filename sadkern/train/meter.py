"""What is logged of a run, summed on the device until it is."""

from __future__ import annotations

import resource
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sadkern.span_kl import SpanLoss
from sadkern.spans import ACT, REASON

SPANS = {REASON: "reason", ACT: "act"}


class Meter:
    """Sums over supervised rows since the last log."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.begin()

    def begin(self) -> None:
        """Time counts from here."""
        self._since = time.perf_counter()

    def add(
        self, out: SpanLoss, kinds: Tensor, batch: Mapping[str, Tensor], ce: bool, **terms: Tensor
    ) -> None:
        """kinds: span ids of the rows of `out` [M]. batch: what the model was given. terms: of the
        loss beside the divergence, each a number of the batch."""
        for kind, name in SPANS.items():
            member = kinds == kind
            self._sum(f"{name}/tokens", member)
            self._sum(f"{name}/kl", torch.where(member, out.per_token, 0))
            self._sum(f"{name}/agreement", member & out.agreement)
            self._sum(f"{name}/entropy", torch.where(member, out.teacher_entropy, 0))
            if ce:
                self._sum(f"{name}/ce", torch.where(member, out.cross_entropy, 0))
        self._sum("rows", torch.ones_like(kinds))
        self._sum("teacher_entropy", out.teacher_entropy)
        self._sum("tail_mass", out.tail_mass)
        self._sum("tokens", batch.get("attention_mask", torch.ones_like(batch["input_ids"])))
        self._sum("batches", torch.ones(1, device=kinds.device))
        for name, term in terms.items():
            self._sum(f"term/{name}", term)
        if "difficulty" in batch:
            self._sum("trajectories", torch.ones_like(batch["difficulty"]))
            self._sum("curriculum/difficulty", batch["difficulty"])

    def _sum(self, name: str, values: Tensor) -> None:
        total = values.sum(dtype=torch.float32)
        self.sums[name] = self.sums[name] + total if name in self.sums else total

    def drain(self, accelerator: Any) -> dict[str, float]:
        """Means per token over all ranks, and the counts; empty where nothing was added."""
        if not self.sums:
            return {}
        names = list(self.sums)
        totals = accelerator.reduce(torch.stack([self.sums[name] for name in names]))
        found = dict(zip(names, totals.tolist(), strict=True))
        self.sums = {}
        seconds = time.perf_counter() - self._since
        self.begin()
        rows, tokens = found.pop("rows"), found.pop("tokens")
        each = {"curriculum": found.pop("trajectories", 0.0), "term": found.pop("batches")}
        counts = {name: found.pop(f"{name}/tokens") for name in SPANS.values()}
        measured = {f"{name}/tokens": count for name, count in counts.items()}
        measured["supervised_share"] = rows / tokens
        for key, total in found.items():
            count = {**counts, **each}.get(key.split("/")[0], rows)
            if count:
                measured[key.removeprefix("term/")] = total / count
        measured["tokens_per_second"] = tokens / seconds
        measured["peak_memory_gb"] = _peak_memory()
        return measured


def _peak_memory() -> float:
    """Of this process: on a GPU, or else of the host."""
    if torch.cuda.is_initialized():  # and not there alone, unused
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
