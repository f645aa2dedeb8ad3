"""The chunk loop: from hidden states to a tile of logits, to its gradient in place, and back.

Only supervised rows are gathered, and of those so many at a time that both sides' tiles fit a byte
budget. A chunk costs two GEMMs into the two reused tiles, the backend's kernel, which turns the
student's tile into its gradient, and two GEMMs from there: nothing grows with N V, and nothing is
computed twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sadkern.backends.reference import RowValues
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

TILE_BYTES = {"cuda": 256 << 20}  # of both tiles together
TILE_BYTES_ELSEWHERE = 64 << 20
# BLAS packs the weight anew for every so many rows (MKL: about 180), so that a chunk of a few more
# pays for twice as many: multiples cost a row least.
BLAS_ROWS = 176
# Of a weight that is not in the tiles' precision so much is converted at a time.
CONVERTED_BYTES = 16 << 20


def dtype_of(student: Side, teacher: Side) -> torch.dtype:
    """Of the logits that a backend is given: as they are where they exist, else the tiles'."""
    if isinstance(student, Tensor) and not isinstance(teacher, Projection):
        return student.dtype
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
    **settings: Any,
) -> RowValues:
    """`RowValues` [...] and, into `gradients`, those of the student's tensors: of logits, or of
    hidden, weight and bias, each where there is one. `settings` are those of the backend's own
    `divergence_rows`, which alone is needed where logits exist on both sides, or a top-k.
    """
    if isinstance(student, Tensor) and not isinstance(teacher, Projection):
        return backend.divergence_rows(
            student, teacher, supervised, row_weights, labels, gradients[0], **settings
        )
    wide, vocab = precision(student, teacher), common_vocabulary(student, teacher)
    s = _source(student, vocab, wide, gradients)
    t = teacher if isinstance(teacher, TopK) else _source(teacher, vocab, wide)
    softcap = (isinstance(student, Projection) and student.softcap) or 0.0
    if rows is None:
        rows = supervised.reshape(-1).nonzero().squeeze(-1)

    flat_weights = row_weights.reshape(-1)
    flat_labels = None if labels is None else labels.reshape(-1)
    of_value = [wide, wide, wide, torch.bool, wide]
    values = RowValues(*(flat_weights.new_zeros(len(flat_weights), dtype=x) for x in of_value))
    wants_gradient = any(gradient is not None for gradient in gradients)
    sides = 1 if isinstance(t, TopK) else 2
    with torch.autocast(rows.device.type, enabled=False):
        for chunk, tiles in chunks(backend, rows, vocab, sides, wide, chunk_rows):
            tile = s.fill(chunk, tiles[0])
            found = backend.divergence_rows(
                tile,
                part_of(t, torch.unravel_index(chunk, supervised.shape))
                if isinstance(t, TopK)
                else t.fill(chunk, tiles[1]),
                torch.ones_like(chunk, dtype=torch.bool),
                flat_weights[chunk],
                None if flat_labels is None else flat_labels[chunk],
                tile if wants_gradient else None,
                softcap=softcap,
                **settings,
            )
            for whole, part in zip(values, found, strict=True):
                whole.index_copy_(0, chunk, part)
            if wants_gradient:
                s.backward(chunk, tile)
        s.finish(rows)
    return RowValues(*(value.view(supervised.shape) for value in values))


def chunks(
    backend: ModuleType,
    rows: Tensor,  # [M]
    vocab: int,
    sides: int,
    dtype: torch.dtype,
    chunk_rows: int | None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Parts of `rows` of nearly equal length [C], each with its tiles [sides, C, vocab], which are
    the same memory every time."""
    # An odd number of cache lines between rows: a power of two would send them to the same sets.
    line = 64 // dtype.itemsize
    stride = (-(-vocab // line) | 1) * line
    most = chunk_rows
    if most is None:
        budget = TILE_BYTES.get(rows.device.type, TILE_BYTES_ELSEWHERE)
        most = max(1, budget // (sides * stride * dtype.itemsize))
        if rows.device.type == "cpu" and most > BLAS_ROWS:
            most -= most % BLAS_ROWS
    count = -(-len(rows) // most)
    if not count:
        return
    parts = rows.tensor_split(count)
    memory = backend.empty((sides, len(parts[0]), stride), dtype, rows.device)
    for part in parts:
        yield part, memory[:, : len(part), :vocab]


def _source(
    side: Tensor | Projection,
    vocab: int,
    dtype: torch.dtype,
    gradients: Sequence[Tensor | None] = (None, None, None),
) -> LogitRows | Head:
    if isinstance(side, Projection):
        return Head(side, vocab, dtype, gradients)
    return LogitRows(side, vocab, gradients[0])


def _zero_others(gradient: Tensor, rows: Tensor) -> None:
    others = torch.ones(gradient.shape[:-1], dtype=torch.bool, device=rows.device)
    others.view(-1)[rows] = False
    gradient.masked_fill_(others.unsqueeze(-1), 0)


class LogitRows:
    """Rows of logits that exist [..., V], gathered into a tile and scattered from it."""

    def __init__(self, logits: Tensor, vocab: int, gradient: Tensor | None):
        self.logits, self.vocab, self.gradient = logits, vocab, gradient

    def _at(self, rows: Tensor) -> tuple[Tensor, ...]:
        # Not flattened: that would copy logits that are a slice.
        return torch.unravel_index(rows, self.logits.shape[:-1])

    def fill(self, rows: Tensor, tile: Tensor) -> Tensor:
        return tile.copy_(self.logits[..., : self.vocab][self._at(rows)])

    def backward(self, rows: Tensor, tile: Tensor) -> None:
        assert self.gradient is not None
        self.gradient[..., : self.vocab][self._at(rows)] = tile.to(self.gradient.dtype)

    def finish(self, rows: Tensor) -> None:
        if self.gradient is not None:
            _zero_others(self.gradient, rows)
            self.gradient[..., self.vocab :] = 0


class Head:
    """Hidden states and an output head, whose logits are made and taken back tile by tile."""

    def __init__(
        self,
        projection: Projection,
        vocab: int,
        dtype: torch.dtype,
        gradients: Sequence[Tensor | None],
    ):
        self.hidden = projection.hidden.reshape(-1, projection.hidden.shape[-1])  # [N, D]
        self.weight = projection.weight[:vocab]  # [V, D]
        self.bias = None if projection.bias is None else projection.bias[:vocab].to(dtype)
        self.scale, self.softcap, self.dtype = projection.scale, projection.softcap, dtype
        self.gradients = gradients
        self.dhidden, *rest = gradients
        # Summed up over chunks: in the tiles' precision, whatever the weight's.
        self.dweight, self.dbias = (
            x if x is None or x.dtype == dtype else torch.empty_like(x, dtype=dtype) for x in rest
        )
        self.first = True

    def fill(self, rows: Tensor, tile: Tensor) -> Tensor:
        hidden = self.hidden[rows].to(self.dtype)
        for part, weight in self._weight():
            columns = tile[:, part]
            added = columns if self.bias is None else self.bias[part]
            beta = 0.0 if self.bias is None else self.scale
            torch.addmm(added, hidden, weight.t(), beta=beta, alpha=self.scale, out=columns)
        if self.softcap is not None:
            tile.div_(self.softcap).tanh_().mul_(self.softcap)
        return tile

    def backward(self, rows: Tensor, tile: Tensor) -> None:
        """From the gradient of the logits before the softcap."""
        if self.dhidden is not None:
            dhidden = tile.new_empty(len(rows), self.hidden.shape[-1])
            beta = 0.0
            for part, weight in self._weight():
                dhidden.addmm_(tile[:, part], weight, beta=beta, alpha=self.scale)
                beta = 1.0
            flat = self.dhidden.view(-1, dhidden.shape[-1])
            flat.index_copy_(0, rows, dhidden.to(flat.dtype))
        beta = 0.0 if self.first else 1.0
        if self.dweight is not None:
            dweight, hidden = self.dweight[: tile.shape[1]], self.hidden[rows].to(self.dtype)
            dweight.addmm_(tile.t(), hidden, beta=beta, alpha=self.scale)
        if self.dbias is not None:
            ones = tile.new_ones(len(rows))
            dbias = self.dbias[: tile.shape[1]]
            dbias.addmv_(tile.t(), ones, beta=beta, alpha=self.scale)
        self.first = False

    def finish(self, rows: Tensor) -> None:
        if self.dhidden is not None:
            _zero_others(self.dhidden, rows)
        sums = zip((self.dweight, self.dbias), self.gradients[1:], strict=True)
        for summed, gradient in sums:
            if summed is None or gradient is None:
                continue
            # What no chunk has written.
            summed[0 if self.first else len(self.weight) :] = 0
            if summed is not gradient:
                gradient.copy_(summed)

    def _weight(self) -> Iterator[tuple[slice, Tensor]]:
        """The weight in the tiles' precision, by as many rows as are converted at a time."""
        if self.weight.dtype == self.dtype:
            yield slice(0, len(self.weight)), self.weight
            return
        step = max(1, CONVERTED_BYTES // (self.weight.shape[1] * self.dtype.itemsize))
        converted = self.weight.new_empty(
            min(step, len(self.weight)), self.weight.shape[1], dtype=self.dtype
        )
        for begin in range(0, len(self.weight), step):
            weight = self.weight[begin : begin + step]
            yield slice(begin, begin + len(weight)), converted[: len(weight)].copy_(weight)


def logit_tiles(
    backend: ModuleType, source: Tensor | Projection, chunk_rows: int | None
) -> Iterator[Tensor]:
    """All rows of `source` in their order, as tiles of logits [C, V] in the same memory."""
    dtype, vocab = precision(source), vocabulary(source)
    rows = torch.arange(rows_of(source).numel(), device=first_tensor(source).device)
    side = _source(source, vocab, dtype)
    with torch.autocast(rows.device.type, enabled=False):
        for chunk, tiles in chunks(backend, rows, vocab, 1, dtype, chunk_rows):
            yield side.fill(chunk, tiles[0])
