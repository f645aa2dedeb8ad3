"""A side in the chunk loop: it fills a tile with logits and takes the tile's gradient back.

Both kinds have `fill(rows, tile)`, `backward(rows, tile, negligible)` and, when all rows are
through, `finish(rows)`, which writes what no row has written.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from sadkern.ranks import Pending, Ranks
from sadkern.sides import Projection

# Of a weight that is not in the tiles' precision so much is converted at a time.
CONVERTED_BYTES = 16 << 20
# Gathering more of the vocabulary than this costs more than its products.
FEW = 0.2


def tiles_of(
    side: Tensor | Projection,
    vocab: int,
    dtype: torch.dtype,
    gradients: Sequence[Tensor | None] = (None, None, None),
) -> LogitRows | Head:
    """`side` over its first `vocab` tokens, in `dtype`; `gradients` are where those of its tensors
    are to be written."""
    if isinstance(side, Projection):
        return Head(side, vocab, dtype, gradients)
    return LogitRows(side, vocab, dtype, gradients[0])


def multiplies_halves(device: torch.device) -> bool:
    """Whether products of bf16 or fp16 operands come in fp32 there, as they are summed up."""
    return device.type == "cuda"


def multiply(
    out: Tensor, a: Tensor, b: Tensor, alpha: float, beta: float, added: Tensor | None = None
) -> None:
    """out = beta added + alpha a b; what is added is `out` itself where nothing else is given."""
    added = out if added is None else added
    if a.dtype == out.dtype:
        torch.addmm(added, a, b, beta=beta, alpha=alpha, out=out)
    else:
        torch.addmm(added, a, b, out_dtype=out.dtype, beta=beta, alpha=alpha, out=out)


def _zero_others(gradient: Tensor, rows: Tensor) -> None:
    others = torch.ones(gradient.shape[:-1], dtype=torch.bool, device=rows.device)
    others.view(-1).index_fill_(0, rows, False)
    gradient.masked_fill_(others.unsqueeze(-1), 0)


class LogitRows:
    """Rows of logits that exist [..., V], gathered into a tile and scattered from it."""

    def __init__(self, logits: Tensor, vocab: int, dtype: torch.dtype, gradient: Tensor | None):
        self.logits, self.vocab, self.gradient = logits, vocab, gradient
        self.gradient_dtype = dtype
        self.summed_bytes = 0
        self.ranks: Ranks | None = None  # a row's parts are each one's own

    def _at(self, rows: Tensor) -> tuple[Tensor, ...]:
        # Not flattened: that would copy logits that are a slice. (torch.unravel_index would make a
        # tensor of the sizes, for which a device must wait.)
        found = []
        for size in reversed(self.logits.shape[:-1]):
            found.append(rows % size)
            rows = rows // size
        return tuple(reversed(found))

    def fill(self, rows: Tensor, tile: Tensor) -> Tensor:
        return tile.copy_(self.logits[..., : self.vocab][self._at(rows)])

    def backward(self, rows: Tensor, tile: Tensor, negligible: Tensor | None) -> None:
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
        self.summed_bytes = 0 if self.dweight is None else self.dweight.nbytes
        self.first = True
        # Those that share the vocabulary, if any: what a hidden state gets from each is summed up.
        self.ranks: Ranks | None = None
        self.on_its_way: tuple[Tensor, Pending] | None = None
        given = self.weight.dtype
        as_given = given == self.hidden.dtype and multiplies_halves(self.weight.device)
        # A gradient in fp16 might be too small a number: it is scaled only later.
        self.logit_operands = given if as_given and given.itemsize == 2 else dtype
        self.gradient_dtype = given if as_given and given is torch.bfloat16 else dtype

    def fill(self, rows: Tensor, tile: Tensor) -> Tensor:
        hidden = self.hidden[rows].to(self.logit_operands)
        alpha = self.scale / (self.softcap or 1.0)
        for part, weight in self._weight(self.logit_operands):
            added, beta = (None, 0.0) if self.bias is None else (self.bias[part], alpha)
            multiply(tile[:, part], hidden, weight.t(), alpha, beta, added)
        if self.softcap is not None:
            tile.tanh_().mul_(self.softcap)
        return tile

    def backward(self, rows: Tensor, tile: Tensor, negligible: Tensor | None) -> None:
        """From the gradient of the logits before the softcap, in `gradient_dtype`. Tokens whose
        entries are all within +-`negligible` are left out of the products, if they are most."""
        kept = None if negligible is None else self._kept(tile, negligible)
        beta = 0.0 if self.first else 1.0  # what the sums over chunks are worth so far
        if self.dhidden is not None:
            dhidden = tile.new_zeros(len(rows), self.hidden.shape[-1], dtype=self.dtype)
            for part, weight in self._weight(self.gradient_dtype, kept):
                multiply(dhidden, tile[:, part], weight, self.scale, 1.0)
            self._settle()
            if self.ranks is None:
                self._write(rows, dhidden)
            else:
                self.on_its_way = rows, self.ranks.summed(dhidden)
        if self.dweight is not None:
            dweight, hidden = self.dweight[: tile.shape[1]], self.hidden[rows].to(tile.dtype)
            if kept is None:
                multiply(dweight, tile.t(), hidden, self.scale, beta)
            else:
                if self.first:
                    dweight.zero_()
                for part in kept.split(self._step(self.dtype)):
                    among = dweight[part]
                    multiply(among, tile[:, part].t(), hidden, self.scale, 1.0)
                    dweight[part] = among
        if self.dbias is not None:
            dbias = self.dbias[: tile.shape[1]]
            if tile.dtype == dbias.dtype:
                dbias.addmv_(tile.t(), tile.new_ones(len(rows)), beta=beta, alpha=self.scale)
            else:
                summed = self.scale * tile.sum(0, dtype=dbias.dtype)
                dbias.copy_(summed if self.first else dbias + summed)
        self.first = False

    def _settle(self) -> None:
        """Writes the sum that the last chunk has asked for."""
        if self.on_its_way is not None:
            rows, summed = self.on_its_way
            self._write(rows, summed())
            self.on_its_way = None

    def _write(self, rows: Tensor, dhidden: Tensor) -> None:
        assert self.dhidden is not None
        flat = self.dhidden.view(-1, dhidden.shape[-1])
        flat.index_copy_(0, rows, dhidden.to(flat.dtype))

    def finish(self, rows: Tensor) -> None:
        self._settle()
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

    def _kept(self, tile: Tensor, negligible: Tensor) -> Tensor | None:
        # (Said this way round, a NaN is not negligible.)
        left_out = (tile.amax(0) <= negligible) & (tile.amin(0) >= -negligible)
        kept = (~left_out).nonzero().squeeze(-1)
        return kept if len(kept) <= FEW * len(left_out) else None

    def _step(self, dtype: torch.dtype) -> int:
        return max(1, CONVERTED_BYTES // (self.weight.shape[1] * dtype.itemsize))

    def _weight(
        self, dtype: torch.dtype, kept: Tensor | None = None
    ) -> Iterator[tuple[slice | Tensor, Tensor]]:
        """Which of its rows, all or those `kept`, and these in `dtype`; what must be gathered or
        converted for that, part by part."""
        vocab, step = len(self.weight), self._step(dtype)
        if kept is not None:
            for part in kept.split(step):
                yield part, self.weight[part].to(dtype)
            return
        if self.weight.dtype == dtype:
            yield slice(0, vocab), self.weight
            return
        converted = self.weight.new_empty(min(step, vocab), self.weight.shape[1], dtype=dtype)
        for begin in range(0, vocab, step):
            weight = self.weight[begin : begin + step]
            yield slice(begin, begin + len(weight)), converted[: len(weight)].copy_(weight)
