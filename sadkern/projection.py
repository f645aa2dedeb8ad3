"""The chunk loop: from hidden states to a tile of logits, to its gradient in place, and back.

Only supervised rows are gathered, and of those so many at a time that both sides' tiles fit a byte
budget. A chunk costs two GEMMs into the two reused tiles, the backend's kernel, which turns the
student's tile into its gradient, and two GEMMs from there: nothing grows with N V, and nothing is
computed twice.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sadkern.backends.reference import RowValues
from sadkern.backends.shard import Shard
from sadkern.ranks import Ranks
from sadkern.sides import (
    Projection,
    Side,
    TopK,
    common_vocabulary,
    first_tensor,
    part_of,
    precision,
    rows_of,
    vocabulary,
)
from sadkern.tiles import tiles_of

TILE_BYTES = 256 << 20  # of a chunk's tiles together
# Of the bytes that the weight's gradient takes while it is summed up, if that is more: every chunk
# reads and writes those once, which tiles as large as this have hidden behind their own products.
SHARE_OF_SUMS = 0.5
TILE_BYTES_ELSEWHERE = 64 << 20
# BLAS packs the weight anew for every so many rows (MKL: about 180), so that a chunk of a few more
# pays for twice as many: multiples cost a row least.
BLAS_ROWS = 176


def logits_alone(student: Side, teacher: Side) -> bool:
    """Whether there is nothing to project: a backend then takes both sides as they are."""
    return isinstance(student, Tensor) and not isinstance(teacher, Projection)


def dtype_of(student: Side, teacher: Side) -> torch.dtype:
    """Of the logits that a backend is given: as they are where they exist, else the tiles'."""
    if logits_alone(student, teacher):
        return first_tensor(student).dtype
    return precision(student, teacher)


def divergence_rows(
    backend: ModuleType,
    student: Tensor | Projection,  # [..., V] or of [..., D]
    teacher: Side,  # [..., V'], of [..., D'] or [..., K]
    supervised: Tensor,  # [...] bool
    rows: Tensor | None,  # [M] int64, the places of supervised rows among the N = prod(...)
    row_weights: Tensor,  # [...]
    labels: Tensor | None,  # [...]
    gradients: Sequence[Tensor | None],
    *,
    chunk_rows: int | None,
    grad_filter_eps: float | None,
    ranks: Ranks | None = None,
    **settings: Any,
) -> RowValues:
    """`RowValues` [...] and, into `gradients`, those of the student's tensors: of logits, or of
    hidden, weight and bias, each where there is one. `settings` are those of the backend's own
    `divergence_rows`, which alone is needed where logits exist on both sides, or a top-k.
    """
    if ranks is None and logits_alone(student, teacher):
        return backend.divergence_rows(
            student, teacher, supervised, row_weights, labels, gradients[0], **settings
        )
    wide, vocab = precision(student, teacher), common_vocabulary(student, teacher)
    s = tiles_of(student, vocab, wide, gradients)
    t = teacher if isinstance(teacher, TopK) else tiles_of(teacher, vocab, wide)
    softcap = (isinstance(student, Projection) and student.softcap) or 0.0
    if rows is None:
        rows = places(supervised)

    flat_weights = row_weights.reshape(-1)
    flat_labels = None if labels is None else labels.reshape(-1)
    of_value = [wide, wide, wide, torch.bool, wide]
    values = RowValues(*(flat_weights.new_zeros(len(flat_weights), dtype=x) for x in of_value))
    sides = 1 if isinstance(t, TopK) else 2
    at_once, most, summed = 1, vocab, s.summed_bytes
    if ranks is not None:
        # All have as many chunks: as has the one with the most tokens.
        s.ranks, at_once, most = ranks, 2, ranks.most
        summed = summed // vocabulary(student) * most
    budget = tile_bytes(rows.device.type, summed)

    def work(chunk: Tensor, tiles: Tensor, dtile: Tensor) -> Iterator[None]:
        """One chunk's; where it pauses, a message is on its way."""
        wanted = dtile if any(gradient is not None for gradient in gradients) else None
        weights = flat_weights[chunk]
        given = (
            s.fill(chunk, tiles[0]),
            part_of(t, chunk) if isinstance(t, TopK) else t.fill(chunk, tiles[1]),
        )
        hard = None if flat_labels is None else flat_labels[chunk]
        if ranks is None:
            everywhere = torch.ones_like(chunk, dtype=torch.bool)
            found = backend.divergence_rows(
                *given, everywhere, weights, hard, wanted, softcap=softcap, **settings
            )
        else:
            shard = Shard(ranks, *given, hard, softcap=softcap, **settings)
            found = yield from shard.rows(weights, wanted)
        for whole, part in zip(values, found, strict=True):
            whole.index_copy_(0, chunk, part)
        if wanted is not None:
            eps = grad_filter_eps
            s.backward(chunk, dtile, None if eps is None else eps * weights.abs().amax())

    with torch.autocast(rows.device.type, enabled=False):
        parts = chunks(
            backend, rows, vocab, sides, wide, chunk_rows, budget, s.gradient_dtype, at_once, most
        )
        in_turns((work(*part) for part in parts), at_once)
        s.finish(rows)
    return RowValues(*(value.view(supervised.shape) for value in values))


def places(supervised: Tensor) -> Tensor:
    """[M] int64: where the supervised rows are among all. A device is waited for."""
    return supervised.reshape(-1).nonzero().squeeze(-1)


def in_turns(works: Iterable[Iterator[None]], at_once: int) -> None:
    """Runs all, in their order; while one waits for its message, the next has begun."""
    begun: deque[Iterator[None]] = deque()
    for work in works:
        next(work, None)
        begun.append(work)
        if len(begun) == at_once:
            deque(begun.popleft(), maxlen=0)
    for work in begun:
        deque(work, maxlen=0)


def tile_bytes(kind: str, summed: int = 0) -> int:
    """How many bytes of tiles a chunk may take on that kind of device; `summed` are those of the
    weight's gradient."""
    if kind != "cuda":
        return TILE_BYTES_ELSEWHERE
    return max(TILE_BYTES, int(SHARE_OF_SUMS * summed))


def chunks(
    backend: ModuleType,
    rows: Tensor,  # [M]
    vocab: int,
    sides: int,
    dtype: torch.dtype,
    chunk_rows: int | None,
    budget: int,  # bytes, where the rows are not given
    gradient_dtype: torch.dtype,
    at_once: int = 1,
    most_vocab: int = 0,  # on any rank, for all are to have as many chunks
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Parts of `rows` of nearly equal length [C], each with its tiles [sides, C, vocab] and one for
    the gradient [C, vocab], which are the same memory every time, or every other for two `at_once`.
    The gradient's is the first of the tiles, but where it is of another dtype."""
    # An odd number of cache lines between rows: a power of two would send them to the same sets.
    line = 64 // dtype.itemsize
    stride = (-(-max(vocab, most_vocab) // line) | 1) * line
    most = chunk_rows
    if most is None:
        entry = sides * dtype.itemsize
        if gradient_dtype != dtype:
            entry += gradient_dtype.itemsize
        most = max(1, budget // (stride * entry * at_once))
        if rows.device.type == "cpu" and most > BLAS_ROWS:
            most -= most % BLAS_ROWS
    count = -(-len(rows) // most)
    if not count:
        return
    parts = rows.tensor_split(count)
    sizes = at_once, len(parts[0]), stride
    memory = backend.empty((sides, *sizes), dtype, rows.device)
    gradient = memory[0]
    if gradient_dtype != dtype:
        gradient = backend.empty(sizes, gradient_dtype, rows.device)
    for i, part in enumerate(parts):
        tiles, own = memory[:, i % at_once], gradient[i % at_once]
        yield part, tiles[:, : len(part), :vocab], own[: len(part), :vocab]


def logit_tiles(
    backend: ModuleType, source: Tensor | Projection, chunk_rows: int | None
) -> Iterator[Tensor]:
    """All rows of `source` in their order, as tiles of logits [C, V] in the same memory."""
    dtype, vocab = precision(source), vocabulary(source)
    rows = torch.arange(rows_of(source).numel(), device=first_tensor(source).device)
    side = tiles_of(source, vocab, dtype)
    with torch.autocast(rows.device.type, enabled=False):
        budget = tile_bytes(rows.device.type)
        for chunk, tiles, _ in chunks(backend, rows, vocab, 1, dtype, chunk_rows, budget, dtype):
            yield side.fill(chunk, tiles[0])
