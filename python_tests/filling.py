"""What fills stores, for processes that can be killed at any moment, or kill themselves before a
certain one of their operations on files.
"""

from __future__ import annotations

import os
import random
import signal
import sys
from itertools import count

import torch
from small_models import small_model

from sadkern.teacher import OnlineTeacher, build, store_for

V = 300
OPERATIONS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")


def examples(count: int = 60) -> list[dict[str, list[int]]]:
    """Of 6 to 60 tokens, some of them twice."""
    rng = random.Random(0)
    made = []
    for _ in range(count):
        ids = [rng.randrange(V) for _ in range(rng.randrange(6, 60))]
        made.append({"input_ids": ids, "span_ids": [rng.choice((0, 1, 2)) for _ in ids[1:]] + [0]})
        made[-1]["span_ids"][0] = 1
    return made + made[::9]


def fill(
    path: str,
    mode: str = "topk",
    rank: int = 0,
    ranks: int = 1,
    trajectories: int = 60,
    last: int | None = None,
) -> None:
    """As `sadkern cache` does. `last`: the operation on a file before which it is killed."""
    torch.set_num_threads(1)
    if last is not None:
        kill_before(last, path)
    teacher = OnlineTeacher(small_model(1, scale=3.0))
    store = store_for(path, teacher, mode=mode, k=20)
    build(
        store, examples(trajectories), teacher,
        batch_size=2, shard_bytes=15000, share=(rank, ranks), progress=False,
    )  # fmt: skip


def kill_before(last: int, path: str) -> None:
    """Kills this process before operation `last` on a file under `path`."""
    done = count()

    def operate(event: str, arguments: tuple) -> None:
        # What a tree is removed by names no folder.
        ours = path in str(arguments[0]) or event in ("os.remove", "os.rmdir")
        if event in OPERATIONS and ours and next(done) == last:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(operate)
