"""A teacher that was asked before: its signal comes from a store, what is missing from it."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from sadkern.data import SpanCollator, inputs_of
from sadkern.sides import Projection, TopK, empty_topk, moved, pinned
from sadkern.store import Identity, Store, tokenizer_identity
from sadkern.store.care import SHARD_BYTES
from sadkern.store.codec import Columns
from sadkern.store.directory import Writer
from sadkern.teacher.capture import (
    Asked,
    at_positions,
    between,
    decode,
    encode,
    joined,
    load_head,
    save_head,
)
from sadkern.teacher.heads import Heads
from sadkern.teacher.source import Example, Expectant, TeacherSource, trajectories

WRITTEN = "written-"  # shards that training made, one writer a process
NAMED = 5


class MissingError(LookupError):
    """A trajectory is not in the store."""


@runtime_checkable
class NamedSource(TeacherSource, Protocol):
    """A source whose signal may be kept."""

    def facts(self) -> dict[str, Any]:
        """Of the `Identity` of what it says: teacher, revision, vocab."""
        ...


def ask(
    source: TeacherSource, asked: list[Asked], identity: Identity, device: torch.device | str
) -> list[tuple[bytes, Columns]]:
    """Records of what `source` says of those trajectories, as one batch on `device`."""
    examples: list[Any] = []
    for one in asked:
        supervised = np.zeros(len(one.input_ids), np.int64)
        supervised[one.positions] = 1
        examples.append({"input_ids": one.input_ids, "span_ids": supervised})
    batch = {name: x.to(device) for name, x in SpanCollator(0)(examples).items()}
    signal = source(batch["rows"], **inputs_of(batch))
    ends = np.cumsum([len(one.positions) for one in asked]).tolist()
    return [
        (one.key, encode(between(signal, begin, end), one, identity))
        for one, begin, end in zip(asked, [0, *ends], ends, strict=False)
    ]


def store_for(
    path: str | Path,
    source: NamedSource,
    tokenizer: Any = None,
    *,
    mode: str = "topk",
    k: int = 64,
    temperature: float = 1.0,
    parts: bool = False,
) -> Store:
    """The store at `path` of what `source` says, made where there is none; see `Store.create`.

    ValueError: the source cannot say that. IdentityError: the store there is of another signal.
    """
    if not isinstance(source, NamedSource):
        raise ValueError(
            f"a {type(source).__name__} has no facts(), by which a store knows whose signal it "
            "keeps: expected an OnlineTeacher, a ServedTeacher, or `facts` beside its call"
        )
    hidden = mode == "hidden"
    if hidden and not hasattr(source, "head"):
        raise ValueError(
            f"mode='hidden' keeps hidden states, and a {type(source).__name__} has none: expected "
            "mode='topk', or an OnlineTeacher"
        )
    identity = Identity(
        mode=mode, k=None if hidden else k, temperature=None if hidden else float(temperature),
        **source.facts(), **{} if tokenizer is None else tokenizer_identity(tokenizer),
    )  # fmt: skip
    store = Store.create(path, identity, parts=parts)
    if hidden:
        save_head(store, source.head)  # type: ignore[attr-defined]
    return store


class CachedTeacher:
    """Reads a store that `sadkern cache` wrote, or an earlier epoch.

    A trajectory is found by its tokens: shuffling, batch size, span weights, curriculum, resuming
    and another student change nothing. With a `source` what is missing is asked of it and kept
    (write-through): the first epoch computes, later ones read, and both see the same numbers, since
    the first is given what it has just written.

    Args:
        path: the store.
        source: an `OnlineTeacher`, a `ServedTeacher` or whatever has `facts` beside its call.
        tokenizer: of the trajectories; in a store that `source` is to fill, its identity.
        mode: of such a store: topk, hidden or sampled.
        k: of such a store: tokens of a row, or draws.
        temperature: of such a store's log-probabilities.

    Raises:
        FileNotFoundError: no store there and no source.
        ValueError: `source` has no `facts`, or cannot say what `mode` keeps.
        DamagedError: a file is not what was written.
        IdentityError: the store holds another signal than the source's.
    """

    def __init__(
        self,
        path: str | Path,
        source: NamedSource | None = None,
        *,
        tokenizer: Any = None,
        mode: str = "topk",
        k: int = 64,
        temperature: float = 1.0,
    ):
        self.source = source
        if source is None:
            self.store = Store.open(path, parts=True)
        else:
            self.store = store_for(
                path, source, tokenizer, mode=mode, k=k, temperature=temperature, parts=True
            )
            self.store.adopt(self.store.leftovers(WRITTEN))  # of a run that was killed
        self.identity = self.store.identity
        self._writer: Writer | None = None
        self._bytes = 0

    def __call__(self, rows: Tensor, **inputs: Any) -> Projection | TopK:
        """See `TeacherSource`. MissingError: a trajectory is not in the store."""
        asked = [Asked.of(*one) for one in trajectories(rows, **inputs)]
        found = [self._read(one) for one in asked]
        if any(columns is None for columns in found):
            self.store.refresh()  # another process may have written it
            missing = [one for one in asked if self._read(one) is None]
            if missing and self.source is None:
                keys = [one.key.hex() for one in missing]
                raise MissingError(self._told(keys, len(asked)))
            if missing:
                self._ask(missing, rows.device)
            found = [self._read(one) for one in asked]
        return self._placed([columns for columns in found if columns is not None], rows.device)

    def expect(self, examples: Sequence[Example], *, tokenizer: Any, temperature: float) -> None:
        """IdentityError: the run would compare with another signal. MissingError: trajectories are
        not in the store, and there is no source."""
        signal = replace(
            self.identity,
            temperature=None if self.identity.mode == "hidden" else temperature,
            **{} if tokenizer is None else tokenizer_identity(tokenizer, self.identity.tokens),
        )
        self.store.require(signal)
        if isinstance(self.source, Expectant):
            self.source.expect(examples, tokenizer=tokenizer, temperature=temperature)
        if self.source is None:
            asked = map(Asked.of_example, examples)
            missing = [
                f"{i}"
                for i, one in enumerate(asked)
                if not self.store.covers(one.key, one.positions)
            ]
            if missing:
                raise MissingError(self._told(missing, len(examples)))

    def mean_entropy(self, example: Example) -> float | None:
        """The teacher's, over the supervised rows, in nats; None: they are not all here."""
        columns = self._read(Asked.of_example(example))
        return None if columns is None else float(columns["entropy"].mean(dtype=np.float64))

    def close(self) -> None:
        """Makes a shard of what was written; calling the teacher goes on after that."""
        if self._writer is not None:
            with self._writer:
                self._writer.seal()
            self._writer, self._bytes = None, 0

    def _read(self, one: Asked) -> Columns | None:
        if one.key not in self.store:
            return None
        return at_positions(self.store.read(one.key), one.positions, self.identity)

    def _ask(self, missing: list[Asked], device: torch.device) -> None:
        """Has the source say what is missing, and writes it down."""
        assert self.source is not None
        wanted = {}
        for one in missing:
            # A record takes the place of one with fewer rows: what that had is made again with it.
            others = self.store.positions(one.key) if one.key in self.store else one.positions
            wanted[one.key] = one._replace(positions=np.union1d(others, one.positions))
        records = ask(self.source, list(wanted.values()), self.identity, device)
        if self._writer is None:
            self._writer = self.store.writer(WRITTEN + uuid.uuid4().hex)
        self.store.index(self._writer.add(records))
        self._bytes += sum(x.nbytes for _, columns in records for x in columns.values())
        if self._bytes >= SHARD_BYTES:
            self.close()

    @cached_property
    def _heads(self) -> Heads:
        return Heads(load_head(self.store))

    def _placed(self, parts: list[Columns], device: torch.device) -> Projection | TopK:
        if parts:
            signal = decode(joined(parts), self.identity)
        elif self.identity.mode == "hidden":
            signal = self._heads.own.hidden
        else:
            signal = empty_topk(
                torch.empty(0), torch.Size([0]), self.identity.k or 1, torch.float32
            )
        if isinstance(signal, Tensor):
            signal = signal.to(self._heads.own.weight.dtype)
        placed = moved(pinned(signal) if device.type == "cuda" else signal, device)
        return self._heads.of(placed) if isinstance(signal, Tensor) else placed

    def _told(self, names: list[str], total: int) -> str:
        few = ", ".join(names[:NAMED]) + (" .." if len(names) > NAMED else "")
        return (
            f"{len(names)} of {total} trajectories are not in {self.store.path}, which has "
            f"{len(self.store)}: number {few}. Expected those that it was made of, cut to the same "
            "max_length and with the same supervised spans: `sadkern cache` adds what is missing"
        )
