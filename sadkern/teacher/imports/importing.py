"""Rows of captures to a store."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from sadkern.data import tell_left_out
from sadkern.sides import TopK
from sadkern.spans.files import Line
from sadkern.store import Identity, Store, content_key, tokenizer_identity
from sadkern.store.care import SHARD_BYTES
from sadkern.store.codec import LOWEST, Columns
from sadkern.store.identity import digest
from sadkern.teacher.capture import Asked, encode
from sadkern.teacher.imports.table import Array, Format, Row, read_table, vector

logger = logging.getLogger(__name__)
IMPORTED = "import-"
EXCESS = 1e-3  # of mass above 1: more than values in few bits have by rounding
TOLD_FROM = 100  # rows, from which on a wrong alignment is told from chance


def import_files(
    output: str | Path,
    files: Sequence[str | Path],
    source: Format,
    *,
    teacher: str,
    revision: str | None = None,
    temperature: float = 1.0,
    tokenizer: Any = None,
    vocab: int | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: bool = True,
) -> Importer:
    """Adds to the store at `output` what it lacks of the sequences in `files`; what was done.

    Rows that are malformed are left out, and named by file and row in a warning. k, where the
    format does not say it, is what a row of the first sequence has.

    Args:
        source: a `DistillKit` or an `Axolotl`.
        temperature: at which the teacher gave its log-probabilities.
        tokenizer: of the teacher; a run with another is then refused.
        vocab: the teacher's number of logits, where neither source nor tokenizer say it.

    Raises:
        ValueError: no sequence could be read, or the vocabulary's size is not known.
        IdentityError: the store there is of another signal.
    """
    texts = {} if tokenizer is None else tokenizer_identity(tokenizer)
    vocab = vocab or source.vocab or texts.get("tokens")
    if vocab is None:
        raise ValueError("the size of the teacher's vocabulary is not known: expected --vocab")
    sizes = [Path(file).stat().st_size for file in files]
    identity = Identity(
        "topk", k=source.k or _width(files, source), temperature=temperature, vocab=vocab,
        teacher=teacher, revision=revision, **texts,
    )  # fmt: skip
    bar = tqdm(total=sum(sizes), unit="B", unit_scale=True, desc="importing", disable=not progress)
    with bar, Importer(Store.create(output, identity), source, shard_bytes) as importer:
        for i, file in enumerate(files):
            before = sum(sizes[:i])

            def told(read: int, before: int = before) -> None:
                bar.update(before + read - bar.n)

            importer.add(file, read_table(file, source.columns, told))
    if not importer.added + importer.there:
        raise ValueError(
            f"no sequence could be read ({importer.left_out} rows were left out, see the warnings "
            f"above): expected a capture of {type(source).__name__}"
        )
    return importer


class Importer:
    """Adds sequences to a store. A context: leaving it writes down what is left, and warns of what
    was odd about all of them."""

    def __init__(self, store: Store, source: Format, shard_bytes: int = SHARD_BYTES):
        self.store, self.source, self.shard_bytes = store, source, shard_bytes
        self.added = self.there = self.left_out = 0
        self._group: dict[bytes, Columns] = {}
        self._bytes = self._rows = self._above = 0
        self._hits = np.zeros(3, np.int64)
        store.adopt(store.leftovers(IMPORTED))  # of an import that was interrupted

    def __enter__(self) -> Importer:
        return self

    def __exit__(self, *_: object) -> None:
        self._write()
        if self._above:
            logger.warning(
                "%d of %d rows had a mass above 1, which is 1 now: expected of values that were "
                "fitted, not of exact ones", self._above, self._rows,
            )  # fmt: skip
        own, following, later = self._hits / max(self._rows, 1)
        if self._rows >= TOLD_FROM and max(own, later) > 1.5 * following:
            logger.warning(
                "the token that follows is among a row's entries in %.0f%% of the rows, the one "
                "before it in %.0f%%, the one after it in %.0f%%: the rows seem to be shifted. "
                "Expected --align %s, and another --output",
                *(100 * following, 100 * own, 100 * later, "same" if own > later else "next"),
            )

    def add(self, name: str | Path, rows: Iterable[Line | Row]) -> None:
        """Of a file, or of anything else that gives rows; `name`: in warnings."""
        refused: defaultdict[str, list[int]] = defaultdict(list)
        for i, line in enumerate(rows, 1):
            number, row, fault = line if isinstance(line, Line) else Line(i, line)
            if fault is None:
                try:
                    self._take(row)
                except ValueError as error:
                    fault = str(error)
            if fault is not None:
                refused[fault].append(number)
        tell_left_out(name, refused)
        self.left_out += sum(map(len, refused.values()))

    def _take(self, row: Any) -> None:
        if not isinstance(row, dict):
            raise ValueError(f"a row is a {type(row).__name__}: expected one with named columns")
        tokens, begin = _sequence(row)
        key = content_key(tokens)
        if key in self.store or key in self._group:
            self.there += 1
            return
        vocab = self.store.identity.vocab
        if len(tokens) and not 0 <= tokens.min() <= tokens.max() < vocab:
            raise ValueError(f"input_ids are not all below {vocab}, the vocabulary's size")
        positions, given_ids, given = self.source.read(row)
        ids, logprobs = _tidy(given_ids, given, vocab)
        positions = positions - begin
        # The last token's row speaks of one that is not there.
        kept = (ids >= 0).any(-1) & (positions >= 0) & (positions < len(tokens) - 1)
        positions, ids, logprobs = positions[kept], ids[kept], logprobs[kept]
        if not len(positions):
            raise ValueError("no position has an entry")
        mass = np.logaddexp.reduce(logprobs, axis=-1, keepdims=True)
        signal = TopK(torch.from_numpy(ids), torch.from_numpy(logprobs - np.maximum(mass, 0)))
        columns = encode(signal, Asked(key, tokens, positions), self.store.identity)
        self._above += int((mass > np.log1p(EXCESS)).sum())
        self._rows += len(positions)
        around = np.append(tokens, -2)  # -2: no token, nor an entry
        self._hits += [(ids == around[positions + i][:, None]).any(-1).sum() for i in range(3)]
        self._group[key] = columns
        self._bytes += sum(column.nbytes for column in columns.values())
        self.added += 1
        if self._bytes >= self.shard_bytes:
            self._write()

    def _write(self) -> None:
        if self._group:
            name = IMPORTED + digest([key.hex() for key in self._group])
            with self.store.writer(name) as writer:
                writer.add(self._group.items())
                writer.seal()
            self._group, self._bytes = {}, 0


def _sequence(row: Row) -> tuple[Array, int]:
    """A row's tokens without padding, and where in its columns they begin."""
    tokens = vector(row, "input_ids")
    if row.get("attention_mask") is None:
        return tokens, 0
    mask = vector(row, "attention_mask")
    if mask.max(initial=0) > 1:
        raise ValueError(
            "attention_mask numbers the documents of a pack (it has values above 1): expected the "
            "capture as it was before it was packed"
        )
    inside = np.flatnonzero(mask)
    if len(mask) != len(tokens) or not len(inside) or inside[-1] - inside[0] >= len(inside):
        raise ValueError(
            f"attention_mask is not a run of 1 among the {len(tokens)} input_ids: expected padding "
            "at the ends alone"
        )
    return tokens[inside], int(inside[0])


def _tidy(ids: Array, logprobs: Array, vocab: int) -> tuple[Array, Array]:
    """The likeliest first; what is no entry, -1 and -inf, last. ValueError: no distributions."""
    logprobs = logprobs.astype(np.float64)
    absent = (ids < 0) | (logprobs < LOWEST)  # -1e9 stands for -inf, too
    ids, logprobs = np.where(absent, -1, ids), np.where(absent, -np.inf, logprobs)
    if np.isnan(logprobs).any() or np.isposinf(logprobs).any():
        raise ValueError("a log-probability is NaN or infinite")
    if (ids >= vocab).any():
        raise ValueError(
            f"an entry is of token {vocab} or more: expected below the vocabulary's size"
        )
    order = np.argsort(-logprobs, axis=-1, kind="stable")
    ids, logprobs = (np.take_along_axis(x, order, axis=-1) for x in (ids, logprobs))
    ascending = np.sort(ids, axis=-1)
    if ((ascending[:, 1:] == ascending[:, :-1]) & (ascending[:, 1:] >= 0)).any():
        raise ValueError("a token is twice among a position's entries")
    return ids, logprobs


def _width(files: Sequence[str | Path], source: Format) -> int:
    """Entries of a row, as the first sequence has them that can be read."""
    for file in files:
        for line in read_table(file, source.columns):
            with suppress(ValueError, AttributeError):
                return max(source.read(line.record).ids.shape[1], 1)
    raise ValueError(
        f"no sequence could be read in {', '.join(map(str, files))}: expected a capture of "
        f"{type(source).__name__}"
    )
