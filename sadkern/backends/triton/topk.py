"""The k likeliest tokens of a row, its log-normaliser, entropy and the mass of the tail.

The first sweep leaves the sums and, for each of a tile's places, the maximum of what stands there
in all tiles. The k-th largest of those maxima is a bound: k entries at least reach it, few more do.
The second sweep writes down which, in the order of ids; those few are ranked by counting. Where too
many do (ties, or all that is large in the same places), the k-th largest entry itself is found by
bisection over the row, and of the entries equal to it only as many as are wanted are written.

Entries are compared as integers in the same order, their keys.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from sadkern.backends.triton import divergence as of
from sadkern.backends.triton import row as rows

LOWEST: tl.constexpr = tl.constexpr(-(2**31))


class Sums(NamedTuple):
    """Moments of a part of a row, centred on its maximum."""

    top: tl.tensor  # max of the logits
    sum: tl.tensor  # sum e^x
    ent: tl.tensor  # sum e^x x


@triton.jit
def sums_of(logits, inv_temperature):
    """Of a tile."""
    top = tl.max(logits)
    x = (logits - of.finite(top)) * inv_temperature
    e = tl.exp(x)
    return Sums(top, tl.sum(e), tl.sum(of.times_unless_zero(e, x)))


@triton.jit
def merge(a, b, inv_temperature):
    """As `divergence.merge`."""
    top = tl.maximum(a.top, b.top)
    shift_a = of.below(a.top, top) * inv_temperature
    shift_b = of.below(b.top, top) * inv_temperature
    scale_a, scale_b = tl.exp(shift_a), tl.exp(shift_b)
    return Sums(
        top,
        a.sum * scale_a + b.sum * scale_b,
        of.recentred(a.ent, a.sum, shift_a, scale_a) + of.recentred(b.ent, b.sum, shift_b, scale_b),
    )


@triton.jit
def key_of(logits):
    """int32 in the order of the logits; -0 is 0."""
    bits = tl.where(logits == 0, 0.0, logits).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def logit_of(key):
    """The logit that has this key."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def count_from(key, kept, x, vocab, TILE: tl.constexpr, TILES: tl.constexpr,
               PACKED: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """How many of the row's entries reach `key`."""
    DTYPE: tl.constexpr = x.dtype.element_ty
    count = 0
    for tile in tl.range(tl.cdiv(vocab, TILE), num_stages=STAGES):
        raw, kept = rows.next_tile(kept, x, tile * TILE, vocab, TILE, TILES, PACKED)
        there = rows.columns(tile * TILE, TILE, PACKED) < vocab
        reach = (key_of(rows.wide(raw, DTYPE, PACKED)) >= key) & there
        count += tl.sum(reach.to(tl.int32))
    return count


@triton.jit
def write_down(keys, ids, bound, equals, top, inv_temperature, kept, x, vocab,
               CANDIDATES: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr,
               PACKED: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """Keys and ids of the entries above `bound`, and of the first `equals` at it, by id. How many
    they are, of which no more than CANDIDATES are written, and sum e^x of all others."""
    DTYPE: tl.constexpr = x.dtype.element_ty
    count = 0
    equal = 0
    tail = 0.0
    for tile in tl.range(tl.cdiv(vocab, TILE), num_stages=STAGES):
        raw, kept = rows.next_tile(kept, x, tile * TILE, vocab, TILE, TILES, PACKED)
        entries = rows.wide(raw, DTYPE, PACKED)
        below = key_of(entries) < bound
        e = tl.exp((entries - top) * inv_temperature)
        tail += tl.sum(tl.where(below, e, 0.0))
        if tl.min(below.to(tl.int32)) == 0:
            key = tl.reshape(key_of(entries), [TILE])
            column = tile * TILE + tl.arange(0, TILE)
            above = ((key > bound) & (column < vocab)).to(tl.int32)
            at = ((key == bound) & (column < vocab)).to(tl.int32)
            wanted = tl.where(equal + tl.cumsum(at, 0) <= equals, at, 0)
            place = count + tl.cumsum(above + wanted, 0) - 1
            written = (above + wanted > 0) & (place < CANDIDATES)
            tl.store(keys + place, key, mask=written)
            tl.store(ids + place, column, mask=written)
            tail += tl.sum(at - wanted) * tl.exp((logit_of(bound) - top) * inv_temperature)
            equal += tl.sum(at)
            count += tl.sum(above + wanted)
    return count, tail


@triton.jit
def kernel(
    logits, logits_inner, logits_outer, logits_stride,  # [..., vocab]
    ids,  # [N, K] int32
    logprobs,  # [N, K] fp32
    tail_mass, entropy, lse,  # [N] fp32
    candidate_keys, candidate_ids,  # [programs, CANDIDATES] int32
    n, k, vocab, inv_temperature,
    CANDIDATES: tl.constexpr, TOGETHER: tl.constexpr,
    TILE: tl.constexpr, TILES: tl.constexpr, PACKED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = logits.dtype.element_ty
    candidate_keys += tl.program_id(0) * CANDIDATES
    candidate_ids += tl.program_id(0) * CANDIDATES
    slot = tl.arange(0, CANDIDATES)
    for row in tl.range(tl.program_id(0), n, tl.num_programs(0)):
        x = rows.row_pointer(logits, row, logits_inner, logits_outer, logits_stride)
        kept = rows.room(x, TILE, TILES, PACKED)
        sums = Sums(-float("inf"), 0.0, 0.0)
        highest = key_of(rows.wide(rows.load(x, 0, 0, TILE, PACKED), DTYPE, PACKED))
        for tile in tl.range(tl.cdiv(vocab, TILE), num_stages=STAGES):
            raw = rows.load(x, tile * TILE, vocab, TILE, PACKED)
            kept = rows.keep(kept, raw, TILES)
            entries = rows.wide(raw, DTYPE, PACKED)
            highest = tl.maximum(highest, key_of(entries))
            sums = merge(sums, sums_of(entries, inv_temperature), inv_temperature)
        log_sum = tl.log(sums.sum)
        tl.store(lse + row, sums.top * inv_temperature + log_sum)
        tl.store(entropy + row, log_sum - sums.ent / sums.sum)

        # Bit by bit, the sign first.
        bound = tl.where(tl.sum((highest >= 0).to(tl.int32)) >= k, 0, LOWEST)
        for i in tl.range(31):
            trial = bound | (1 << (30 - i))
            bound = tl.where(tl.sum((highest >= trial).to(tl.int32)) >= k, trial, bound)
        top = of.finite(sums.top)
        count, tail = write_down(
            candidate_keys, candidate_ids, bound, vocab, top, inv_temperature, kept, x, vocab,
            CANDIDATES, TILE, TILES, PACKED, STAGES,
        )  # fmt: skip
        if count > CANDIDATES:
            reached = count_from(0, kept, x, vocab, TILE, TILES, PACKED, STAGES)
            bound = tl.where(reached >= k, 0, LOWEST)
            for i in tl.range(31):
                trial = bound | (1 << (30 - i))
                reached = count_from(trial, kept, x, vocab, TILE, TILES, PACKED, STAGES)
                bound = tl.where(reached >= k, trial, bound)
            above = count_from(bound + 1, kept, x, vocab, TILE, TILES, PACKED, STAGES)
            tl.debug_barrier()
            count, tail = write_down(
                candidate_keys, candidate_ids, bound, k - above, top, inv_temperature, kept, x,
                vocab, CANDIDATES, TILE, TILES, PACKED, STAGES,
            )  # fmt: skip
        tl.debug_barrier()

        key = tl.load(candidate_keys + slot, mask=slot < count, other=LOWEST)
        token = tl.load(candidate_ids + slot, mask=slot < count, other=0)
        rank = tl.zeros([CANDIDATES], tl.int32)
        for begin in tl.range(0, count, TOGETHER):
            at = begin + tl.arange(0, TOGETHER)
            other = tl.load(candidate_keys + at, mask=at < count, other=LOWEST)[None, :]
            earlier = at[None, :] < slot[:, None]
            first = (other > key[:, None]) | ((other == key[:, None]) & earlier)
            rank += tl.sum((first & (at < count)[None, :]).to(tl.int32), 1)
        chosen = (slot < count) & (rank < k)
        x_chosen = (logit_of(key) - top) * inv_temperature
        out = tl.cast(row, tl.int64) * k + rank
        tl.store(ids + out, token, mask=chosen)
        tl.store(logprobs + out, x_chosen - log_sum, mask=chosen)
        tail += tl.sum(tl.where((slot < count) & (rank >= k), tl.exp(x_chosen), 0.0))
        tl.store(tail_mass + row, tail / sums.sum)
        tl.debug_barrier()
