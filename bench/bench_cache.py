"""How many of a teacher's entries does a cache give in a second, and does the order matter?

    pytest bench/bench_cache.py --benchmark-enable

A cache of 1 GB, as of a 151936-token vocabulary at K = 64; every batch of 8 trajectories is looked
up, checked against its checksums, decoded and put together as `CachedTeacher` does it. One epoch in
the order in which it was written, one shuffled, in turns. The file is in the page cache: it is the
reading that is measured, not the disk.
"""

from __future__ import annotations

import random
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sadkern.data import SpanCollator, inputs_of
from sadkern.sides import TopK
from sadkern.store import Identity, Store, content_key
from sadkern.store.codec import encode_topk
from sadkern.teacher import CachedTeacher

V, K, BATCH = 151936, 64, 8
TRAJECTORIES, ROWS, ROUNDS = 8192, 420, 5
PER_SHARD = 1024


def written(path: Path) -> list[dict[str, list[int]]]:
    """Fills a store; the trajectories that it has."""
    rng = np.random.default_rng(0)
    store = Store.create(path, Identity("topk", k=K, temperature=1.0, vocab=V))
    examples = []
    logits = np.sort(rng.normal(size=(ROWS, K)) * 3)[:, ::-1]
    logprobs = logits - np.logaddexp.reduce(logits, -1, keepdims=True) - 0.05
    tail = 1 - np.exp(logprobs).sum(-1)
    for begin in range(0, TRAJECTORIES, PER_SHARD):
        records = []
        for _ in range(PER_SHARD):
            ids = rng.integers(0, V, 3 * ROWS).tolist()
            span_ids = [1, 0, 2] * (ROWS // 2 + 1)
            span_ids = [*span_ids[: 3 * ROWS // 2], *([0] * (3 * ROWS - 3 * ROWS // 2))]
            positions = np.flatnonzero(span_ids).astype(np.int32)
            columns = {"position": positions, "label_logprob": logprobs[:, 0].astype(np.float32)}
            tokens = rng.integers(0, V, (ROWS, K)).astype(np.int32)
            columns |= encode_topk(tokens, logprobs, tail, tail, V)
            records.append((content_key(ids), columns))
            examples.append({"input_ids": ids, "span_ids": span_ids})
        with store.writer(f"{begin:06d}") as writer:
            writer.add(records)
            writer.seal()
    return examples


def epoch(teacher: CachedTeacher, batches: list[dict[str, torch.Tensor]]) -> float:
    """Seconds."""
    began = time.perf_counter()
    for batch in batches:
        teacher(batch["rows"], **inputs_of(batch))
    return time.perf_counter() - began


def test_reading_in_order_and_shuffled(tmp_path: Path, benchmark: Any) -> None:
    examples = written(tmp_path)
    teacher = CachedTeacher(tmp_path)
    shards = teacher.store.manifest["shards"].values()
    collate = SpanCollator(0)
    shuffled = list(examples)
    random.Random(0).shuffle(shuffled)
    orders = {}
    for name, order in (("in order", examples), ("shuffled", shuffled)):
        groups = [order[begin : begin + BATCH] for begin in range(0, len(order), BATCH)]
        orders[name] = [collate(group) for group in groups]
    first = orders["shuffled"][0]
    found = teacher(first["rows"], **inputs_of(first))  # right before fast
    assert isinstance(found, TopK)
    assert found.tail_mass is not None
    assert found.ids.shape == (BATCH * ROWS, K)
    np.testing.assert_allclose(
        (found.logprobs.exp().sum(-1) + found.tail_mass).numpy(), 1, atol=1e-6
    )
    times: dict[str, list[float]] = {name: [] for name in orders}
    for _ in range(ROUNDS if benchmark.enabled else 1):
        for name, batches in orders.items():
            times[name].append(epoch(teacher, batches))
    tokens, size = TRAJECTORIES * ROWS, sum(shard["bytes"] for shard in shards)
    benchmark.group = f"reading a cache of {size:,} bytes, {size / tokens:.1f} a supervised token"
    benchmark.pedantic(epoch, (teacher, orders["shuffled"][:64]), rounds=1)
    median = {name: statistics.median(each) for name, each in times.items()}
    benchmark.extra_info["rows"] = [
        {
            "order": name,
            "million entries a second": tokens * K / seconds / 1e6,
            "time / in order": seconds / median["in order"],
        }
        for name, seconds in median.items()
    ]
