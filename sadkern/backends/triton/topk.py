"""The k likeliest tokens of a row, its log-normaliser, entropy and the mass of the tail.

The first sweep leaves the sums and, for each of a tile's places, the maximum of what stands there
in all tiles. The k-th largest of those maxima is a bound: k entries at least reach it, few more do.
The second sweep writes down which, in any order; those few are sorted. Where too many do (ties, or
all that is large in the same places), the k-th largest entry itself is found by bisection over the
row, and of the entries equal to it only as many as are wanted are written.

Bisections and the sort go by integers in the order of the logits, their keys.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from sadkern.backends.triton import divergence as of
from sadkern.backends.triton import row as rows

LOWEST: tl.constexpr = tl.constexpr(-(2**31))
LOWEST_PAIR: tl.constexpr = tl.constexpr(-(2**63))
LAST: tl.constexpr = tl.constexpr(2**31 - 1)  # id; an exclusive or with it turns the order round
KEY_OF_NONE: tl.constexpr = tl.constexpr(LOWEST.value | 0x7FFFFF)  # of -inf


class Sums(NamedTuple):
    """Moments of a part of a row, centred on its maximum; of each lane's entries at first."""

    top: tl.tensor  # max of the logits
    sum: tl.tensor  # sum e^(x / T)
    ent: tl.tensor  # sum e^(x / T) x


@triton.jit
def with_group(a, group, rate, TILE: tl.constexpr):
    """As `divergence.with_group`; and the group's highest, place by place."""
    highest = rows.highest(group)
    top = tl.max(highest)
    if top > a.top:
        lower = a.top - top
        scale = rows.exp2(lower * rate)
        a = Sums(top, a.sum * scale, of.moved(a.ent, a.sum, lower, scale))
    sums, ent = a.sum, a.ent
    for i in tl.static_range(len(group)):
        x = group[i] - of.finite(a.top)
        e = rows.exp2(x * rate)
        sums += rows.by_lane(e, TILE)
        ent += rows.by_lane(of.times_unless_zero(e, x), TILE)
    return Sums(a.top, sums, ent), highest


@triton.jit
def key_of(logits):
    """int32 in the order of the logits; -0 is 0."""
    bits = tl.where(logits == 0, 0.0, logits).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def logit_of(key):
    """The logit that has this key, -inf for those below its."""
    key = tl.maximum(key, KEY_OF_NONE)
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def count_from(key, kept, x, vocab, TILE: tl.constexpr, TILES: tl.constexpr,
               PACKED: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """How many of the row's entries reach `key`."""
    DTYPE: tl.constexpr = x.dtype.element_ty
    WIDTH: tl.constexpr = GROUP * TILE
    counts = tl.zeros([TILE // 4], tl.int32)
    for group in tl.range(tl.cdiv(vocab, WIDTH), num_stages=STAGES):
        begin = group * WIDTH
        raw, kept = rows.next_group(kept, x, begin, vocab, GROUP, TILE, TILES, PACKED)
        for i in tl.static_range(GROUP):
            there = rows.columns(begin + i * TILE, TILE, PACKED) < vocab
            reach = (key_of(rows.wide(raw[i], DTYPE, PACKED)) >= key) & there
            counts += rows.by_lane(reach.to(tl.int32), TILE)
    return tl.sum(counts)


@triton.jit
def bisected(key, k, BITS: tl.constexpr):
    """The k-th largest of `key`, of which the first BITS bits differ."""
    bound = tl.where(tl.sum((key >= 0).to(tl.int32)) >= k, 0, LOWEST)
    for i in tl.range(1, BITS):
        trial = bound | (1 << (31 - i))
        bound = tl.where(tl.sum((key >= trial).to(tl.int32)) >= k, trial, bound)
    if BITS == 16:  # the others are those of its sign
        bound |= (bound >> 31) & 0xFFFF
    return bound


@triton.jit
def candidates(ids, counter, bound, top, rate, kept, x, vocab, CANDIDATES: tl.constexpr,
               TILE: tl.constexpr, TILES: tl.constexpr, PACKED: tl.constexpr,
               GROUP: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """Ids of the entries from `bound` on, in any order. How many they are, of which no more than
    CANDIDATES are written, and sum e of all others."""
    DTYPE: tl.constexpr = x.dtype.element_ty
    WIDTH: tl.constexpr = GROUP * TILE
    tails = rows.no_sums(TILE)
    for group in tl.range(tl.cdiv(vocab, WIDTH), num_stages=STAGES):
        first = group * WIDTH
        raw, kept = rows.next_group(kept, x, first, vocab, GROUP, TILE, TILES, PACKED)
        for i in tl.static_range(GROUP):
            column = rows.columns(first + i * TILE, TILE, PACKED)
            entries = rows.wide(raw[i], DTYPE, PACKED)
            reach = (entries >= bound) & (column < vocab)
            tails += rows.by_lane(tl.where(reach, 0.0, rows.exp2((entries - top) * rate)), TILE)
            place = tl.atomic_add(counter + 0 * column, 1, mask=reach, sem="relaxed", scope="cta")
            tl.store(ids + place, column, mask=reach & (place < CANDIDATES))
    tl.debug_barrier()
    return tl.atomic_xchg(counter, 0, sem="relaxed", scope="cta"), tl.sum(tails)


@triton.jit
def ordered_candidates(ids, bound, equals, top, rate, kept, x, vocab, TILE: tl.constexpr,
                       TILES: tl.constexpr, PACKED: tl.constexpr, GROUP: tl.constexpr,
                       STAGES: tl.constexpr):  # fmt: skip
    """As `candidates`, of the entries above the key `bound` and of the first `equals` at it, by
    id."""
    DTYPE: tl.constexpr = x.dtype.element_ty
    WIDTH: tl.constexpr = GROUP * TILE
    count = 0
    equal = 0
    tails = rows.no_sums(TILE)
    for group in tl.range(tl.cdiv(vocab, WIDTH), num_stages=STAGES):
        first = group * WIDTH
        raw, kept = rows.next_group(kept, x, first, vocab, GROUP, TILE, TILES, PACKED)
        for i in tl.static_range(GROUP):
            column = first + i * TILE + tl.arange(0, TILE)
            entries = tl.reshape(rows.wide(raw[i], DTYPE, PACKED), [TILE])
            key = key_of(entries)
            above = ((key > bound) & (column < vocab)).to(tl.int32)
            at = ((key == bound) & (column < vocab)).to(tl.int32)
            wanted = tl.where(equal + tl.cumsum(at, 0) <= equals, at, 0)
            chosen = above + wanted
            place = count + tl.cumsum(chosen, 0) - 1
            tl.store(ids + place, column, mask=chosen > 0)
            e = rows.exp2((entries - top) * rate)
            tails += rows.by_lane(tl.where(chosen > 0, 0.0, e), TILE)
            equal += tl.sum(at)
            count += tl.sum(chosen)
    tl.debug_barrier()
    return count, tl.sum(tails)


@triton.jit
def kernel(
    logits, logits_inner, logits_outer, logits_stride,  # [..., vocab]
    ids,  # [N, K] int32
    logprobs,  # [N, K] fp32
    tail_mass, entropy, lse,  # [N] fp32
    candidate_ids,  # [programs, CANDIDATES] int32
    counters,  # [programs] int32, zeros
    n, k, vocab, inv_temperature,
    CANDIDATES: tl.constexpr,
    TILE: tl.constexpr, TILES: tl.constexpr, PACKED: tl.constexpr, GROUP: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = logits.dtype.element_ty
    WIDTH: tl.constexpr = GROUP * TILE
    BITS: tl.constexpr = 16 if DTYPE == tl.bfloat16 else 32  # in which keys differ
    rate = inv_temperature * rows.LOG2_E
    for row in tl.range(tl.program_id(0), n, tl.num_programs(0)):
        x = rows.row_pointer(logits, row, logits_inner, logits_outer, logits_stride)
        kept = rows.fetch(x, 0, vocab, TILE, TILES, PACKED)
        sums = Sums(-float("inf"), rows.no_sums(TILE), rows.no_sums(TILE))
        highest = rows.wide(rows.load(x, 0, 0, TILE, PACKED), DTYPE, PACKED)
        for group in tl.range(tl.cdiv(vocab, WIDTH), num_stages=STAGES):
            begin = group * WIDTH
            raw, kept = rows.next_group(kept, x, begin, vocab, GROUP, TILE, TILES, PACKED)
            sums, of_group = with_group(sums, rows.wide_group(raw, DTYPE, PACKED), rate, TILE)
            highest = tl.maximum(highest, of_group)
        sums = Sums(sums.top, tl.sum(sums.sum), tl.sum(sums.ent))
        log_sum = tl.log(sums.sum)
        tl.store(lse + row, sums.top * inv_temperature + log_sum)
        tl.store(entropy + row, log_sum - sums.ent / sums.sum * inv_temperature)

        found = candidate_ids + tl.program_id(0) * CANDIDATES
        counter = counters + tl.program_id(0)
        bound = bisected(key_of(highest), k, BITS)
        top = of.finite(sums.top)
        count, tail = candidates(
            found, counter, logit_of(bound), top, rate, kept, x, vocab, CANDIDATES, TILE, TILES,
            PACKED, GROUP, STAGES,
        )  # fmt: skip
        if count > CANDIDATES:
            reached = count_from(0, kept, x, vocab, TILE, TILES, PACKED, GROUP, STAGES)
            bound = tl.where(reached >= k, 0, LOWEST)
            for i in tl.range(31):
                trial = bound | (1 << (30 - i))
                reached = count_from(trial, kept, x, vocab, TILE, TILES, PACKED, GROUP, STAGES)
                bound = tl.where(reached >= k, trial, bound)
            above = count_from(bound + 1, kept, x, vocab, TILE, TILES, PACKED, GROUP, STAGES)
            count, tail = ordered_candidates(
                found, bound, k - above, top, rate, kept, x, vocab, TILE, TILES, PACKED, GROUP,
                STAGES,
            )  # fmt: skip

        # The likeliest first, of equals that of the lowest id; then the slots that hold none.
        slot = tl.arange(0, CANDIDATES)
        token = tl.load(found + slot, mask=slot < count, other=0)
        logit = tl.load(x + token, mask=slot < count, other=-float("inf")).to(tl.float32)
        pair = (key_of(logit).to(tl.int64) << 32) | (token ^ LAST)
        pair = tl.sort(tl.where(slot < count, pair, LOWEST_PAIR), descending=True)
        x_sorted = logit_of((pair >> 32).to(tl.int32)) - top
        out = tl.cast(row, tl.int64) * k + slot
        tl.store(ids + out, ((pair & LAST) ^ LAST).to(tl.int32), mask=slot < k)
        tl.store(logprobs + out, x_sorted * inv_temperature - log_sum, mask=slot < k)
        rest = (slot >= k) & (slot < count)
        tail += tl.sum(tl.where(rest, rows.exp2(x_sorted * rate), 0.0))
        tl.store(tail_mass + row, tail / sums.sum)
        tl.debug_barrier()
