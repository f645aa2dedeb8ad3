"""A process that fills stores, in forks of itself that can be killed at any moment.

Everything is imported once: `python caching_child.py` reads from standard input, a line each, the
arguments of `fill` (JSON), and answers with the fork's pid, then with its exit status.
"""

from __future__ import annotations

import json
import os
import random
import sys

from small_models import small_model

from sadkern.store import Store
from sadkern.teacher import OnlineTeacher, build, store_for

V = 300


def examples(count: int = 60) -> list[dict[str, list[int]]]:
    """Of 6 to 60 tokens, some of them twice."""
    rng = random.Random(0)
    made = []
    for _ in range(count):
        ids = [rng.randrange(V) for _ in range(rng.randrange(6, 60))]
        made.append({"input_ids": ids, "span_ids": [rng.choice((0, 1, 2)) for _ in ids[1:]] + [0]})
        made[-1]["span_ids"][0] = 1
    return made + made[::9]


def fill(path: str, mode: str = "topk", rank: int = 0, ranks: int = 1) -> Store:
    """As `sadkern cache` does."""
    teacher = OnlineTeacher(small_model(1, scale=3.0))
    store = store_for(path, teacher, mode=mode, k=20)
    build(
        store, examples(), teacher, batch_size=2, shard_bytes=15000, share=(rank, ranks),
        progress=False,
    )  # fmt: skip
    return store


if __name__ == "__main__":
    for line in sys.stdin:
        child = os.fork()
        if not child:
            fill(*json.loads(line))
            os._exit(0)
        print(child, flush=True)
        print(os.waitpid(child, 0)[1], flush=True)
