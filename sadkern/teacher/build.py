"""Filling a store with a teacher's signal, so that a kill costs one batch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from tqdm.auto import tqdm

from sadkern.files import BusyError
from sadkern.store import Store
from sadkern.store.care import SHARD_BYTES
from sadkern.store.codec import bytes_per_row
from sadkern.store.directory import Writer
from sadkern.store.identity import digest
from sadkern.teacher.cached import WRITTEN, ask
from sadkern.teacher.capture import Asked
from sadkern.teacher.source import Example, TeacherSource

logger = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class Group:
    """What becomes one shard: which trajectories that is depends on the data alone, not on who
    works at it or how often it was interrupted."""

    name: str
    wanted: list[Asked]


def build(
    store: Store,
    examples: Iterable[Example],
    teacher: TeacherSource,
    *,
    batch_size: int = 8,
    shard_bytes: int = SHARD_BYTES,
    device: torch.device | str = "cpu",
    share: tuple[int, int] = (0, 1),
    progress: bool = True,
) -> int:
    """Adds to `store` what it lacks of `examples`; the number of trajectories added here.

    Each batch is on disk before the next begins, and the same call after a kill goes on there: the
    store is then byte for byte that of a run without interruption. Several processes may do this
    at once, each taking whole shards.

    Args:
        store: made for `teacher` by `store_for`.
        examples: with input_ids and span_ids, as `prepare` gives them.
        batch_size: trajectories that are asked of it at a time.
        shard_bytes: about the size of a file.
        device: where batches are put for it.
        share: (rank, ranks) says where in the data one of several processes begins.

    Raises:
        ValueError: the teacher's signal cannot serve the store's mode.
        DamagedError: a file of the store is not what was written.
        Whatever the teacher raises; what it had said before that is kept.
    """
    wanted = _unique(examples)
    width = store.identity.k or teacher.head.weight.shape[1]  # type: ignore[attr-defined]
    groups = _groups(wanted, store, width, shard_bytes)
    # Parts of other groups: of other data, or of another size of shard. What they hold is kept.
    others = {*store.leftovers()} - {group.name for group in groups}
    store.adopt(others.difference(store.leftovers(WRITTEN)))
    store.refresh()
    groups = _groups(wanted, store, width, shard_bytes)
    begin = len(groups) * share[0] // share[1]
    todo = groups[begin:] + groups[:begin]
    tokens = sum(len(one.input_ids) for group in todo for one in group.wanted)
    added = 0
    bar = tqdm(total=tokens, unit="tok", unit_scale=True, desc="caching", disable=not progress)
    with bar:

        def fill(group: Group) -> Callable[[Writer], int]:
            return lambda writer: _fill(
                writer, group, teacher, batch_size, torch.device(device), bar
            )

        while todo:
            busy = []
            for group in todo:
                done = _try(store, group.name, fill(group))
                if done is None:
                    busy.append(group)
                else:
                    added += done
            if len(busy) == len(todo):
                logger.warning("%d shards are left to other processes, which hold them", len(busy))
                break
            todo = busy
    return added


def _unique(examples: Iterable[Example]) -> list[Asked]:
    """In their order, each once."""
    found: dict[bytes, Asked] = {}
    for example in examples:
        one = Asked.of_example(example)
        if one.key in found:
            one = one._replace(positions=np.union1d(one.positions, found[one.key].positions))
        found[one.key] = one
    return list(found.values())


def _groups(wanted: list[Asked], store: Store, width: int, shard_bytes: int) -> list[Group]:
    """What of all that is wanted is lacking, cut where shards are full of what is wanted."""
    identity = store.identity
    per_row = bytes_per_row(width, identity.vocab, hidden=identity.mode == "hidden")
    groups: list[list[Asked]] = [[]]
    size = 0.0
    for one in wanted:
        size += per_row * len(one.positions)
        if size > shard_bytes and groups[-1]:
            groups.append([])
            size = per_row * len(one.positions)
        groups[-1].append(one)
    lacking = [
        [one for one in group if not store.covers(one.key, one.positions)] for group in groups
    ]
    return [
        Group(digest([[one.key.hex(), one.positions.tolist()] for one in group]), group)
        for group in lacking
        if group
    ]


def _try(store: Store, name: str, work: Callable[[Writer], T]) -> T | None:
    """What `work` returns; None: another process has the writer of that name."""
    try:
        with store.writer(name) as writer:
            return work(writer)
    except BusyError:
        return None


def _fill(
    writer: Writer,
    group: Group,
    teacher: TeacherSource,
    batch_size: int,
    device: torch.device,
    bar: tqdm,
) -> int:
    if writer.sealed:  # and killed, or overtaken, before its parts were cleared away
        writer.discard()
        return 0
    # Of like length, so that little is padding.
    order = sorted(group.wanted, key=lambda one: -len(one.input_ids))
    left = [one for one in order if one.key not in writer.parts]
    bar.update(sum(len(one.input_ids) for one in order) - sum(len(one.input_ids) for one in left))
    for begin in range(0, len(left), batch_size):
        some = left[begin : begin + batch_size]
        writer.add(ask(teacher, some, writer.store.identity, device))
        bar.update(sum(len(one.input_ids) for one in some))
    writer.seal([one.key for one in group.wanted])
    return len(left)
