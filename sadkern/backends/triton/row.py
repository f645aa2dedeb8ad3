"""How a row is read and written, and what the kernels do alike with the student's side.

A tile is TILE entries of a row. As it lies in memory it is called raw: of PACKED rows of 16-bit
logits that are words of two entries, so that a row that is kept on chip takes no more registers
than it has bytes. `wide` makes fp32 of it: [TILE] or, of packed ones, [TILE / 2, 2].

A sweep goes by groups of GROUP tiles. A row that is kept on chip is a tuple of its raw tiles, all
fetched before the first is looked at; a sweep turns it round by a group at a time: a loop that the
compiler cannot unroll keeps no more than one group in fp32.

What a sweep adds up is added up lane by lane, and the lanes only once it is through: warps that had
to agree on every tile's sums would do little else.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import libdevice

INTERPRETED: tl.constexpr = tl.constexpr(bool(triton.knobs.runtime.interpret))
LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
BANNED_BF16: tl.constexpr = tl.constexpr(-0x7F0080)  # two entries of -inf: 0xff80ff80
BANNED_FP16: tl.constexpr = tl.constexpr(-0x3FF0400)  # 0xfc00fc00


@triton.jit
def row_pointer(data, row, inner, outer_stride, inner_stride):
    """Of row `row` of logits whose leading dimensions lie like [N / inner, inner]."""
    row = tl.cast(row, tl.int64)
    return data + (row // inner) * outer_stride + (row % inner) * inner_stride


@triton.jit
def columns(begin, TILE: tl.constexpr, PACKED: tl.constexpr):
    """Of a tile's entries, in its wide shape."""
    if PACKED:
        even = begin + 2 * tl.arange(0, TILE // 2)
        return tl.join(even, even + 1)
    else:
        return begin + tl.arange(0, TILE)


@triton.jit
def load(row, begin, vocab, TILE: tl.constexpr, PACKED: tl.constexpr):
    """The raw tile at `begin`; -inf from `vocab` on."""
    if PACKED:
        at = begin // 2 + tl.arange(0, TILE // 2)
        outside: tl.constexpr = BANNED_BF16 if row.dtype.element_ty == tl.bfloat16 else BANNED_FP16
        return tl.load(row.to(tl.pointer_type(tl.int32)) + at, mask=at < vocab // 2, other=outside)
    else:
        at = begin + tl.arange(0, TILE)
        return tl.load(row + at, mask=at < vocab, other=-float("inf"))


@triton.jit
def wide(raw, DTYPE: tl.constexpr, PACKED: tl.constexpr):
    """fp32 of a raw tile of DTYPE."""
    if PACKED:
        if DTYPE == tl.bfloat16:
            low, high = raw << 16, raw & -0x10000
            return tl.join(low.to(tl.float32, bitcast=True), high.to(tl.float32, bitcast=True))
        else:
            low, high = raw.to(tl.int16), (raw >> 16).to(tl.int16)
            return tl.join(low.to(DTYPE, bitcast=True), high.to(DTYPE, bitcast=True)).to(tl.float32)
    else:
        return raw.to(tl.float32)


@triton.jit
def wide_group(raw, DTYPE: tl.constexpr, PACKED: tl.constexpr):
    """The wide tiles of raw ones."""
    tiles = ()
    for i in tl.static_range(len(raw)):
        tiles += (wide(raw[i], DTYPE, PACKED),)
    return tiles


@triton.jit
def fetch(row, begin, vocab, TILE: tl.constexpr, TILES: tl.constexpr, PACKED: tl.constexpr):
    """Raw tiles from `begin` on; () of a row that is not kept."""
    tiles = ()
    for tile in tl.static_range(TILES):
        tiles += (load(row, begin + tile * TILE, vocab, TILE, PACKED),)
    return tiles


@triton.jit
def next_group(kept, row, begin, vocab, GROUP: tl.constexpr, TILE: tl.constexpr,
               TILES: tl.constexpr, PACKED: tl.constexpr):  # fmt: skip
    """The raw tiles from `begin` on and, for the group after it, `kept`: that is swept forwards
    alone."""
    if TILES:
        return kept[:GROUP], kept[GROUP:] + kept[:GROUP]
    else:
        return fetch(row, begin, vocab, TILE, GROUP, PACKED), kept


@triton.jit
def exp2(x):
    """2^x in an instruction: what would be denormal is 0."""
    if INTERPRETED:
        return tl.exp2(x)
    else:
        return libdevice.exp2(x)


@triton.jit
def highest(group):
    """Of wide tiles, place by place."""
    most = group[0]
    for i in tl.static_range(1, len(group)):
        most = tl.maximum(most, group[i])
    return most


@triton.jit
def no_sums(TILE: tl.constexpr):
    """Of every lane."""
    return tl.zeros([TILE // 4], tl.float32)


@triton.jit
def by_lane(entries, TILE: tl.constexpr):
    """The sums of a wide tile, as many as a thread can make of entries that it has itself."""
    return tl.sum(tl.reshape(entries, [TILE // 4, 4]), 1)


@triton.jit
def store(row, begin, vocab, entries, TILE: tl.constexpr):
    """Rounds a wide tile and writes what of it is below `vocab`."""
    at = begin + tl.arange(0, TILE)
    tl.store(row + at, tl.reshape(entries, [TILE]).to(row.dtype.element_ty), mask=at < vocab)


@triton.jit
def zero(row, begin, end, TILE: tl.constexpr):
    """Entries [begin, end)."""
    for tile in tl.range(begin, end, TILE):
        at = tile + tl.arange(0, TILE)
        tl.store(row + at, tl.zeros([TILE], row.dtype.element_ty), mask=at < end)


@triton.jit
def skip(d, row, student_vocab, per_token, cross_entropy, teacher_entropy, agreement,
         HAS_GRADIENT: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    """What is left of a row that is not supervised."""
    tl.store(per_token + row, 0.0)
    tl.store(cross_entropy + row, 0.0)
    tl.store(teacher_entropy + row, 0.0)
    tl.store(agreement + row, 0)
    if HAS_GRADIENT:
        zero(d, 0, student_vocab, TILE)


@triton.jit
def hard_label(labels, row, s, top_s, sum_h, HAS_LABELS: tl.constexpr):
    """The row's label, -1 for none, and the cross-entropy of logits s to it."""
    label = -1
    value = 0.0
    if HAS_LABELS:
        label = tl.load(labels + row)
        if label >= 0:
            value = tl.log(sum_h) + (top_s - tl.load(s + label).to(tl.float32))
    return label, value


@triton.jit
def finish(entries, s, column, label, hard_scale, top_s, over_sum_h, inv_softcap,
           HAS_LABELS: tl.constexpr, HAS_SOFTCAP: tl.constexpr):  # fmt: skip
    """Adds the hard label's gradient to that of logits s, then goes through the softcap.
    `hard_scale` is row weight times ce_weight, 0 without a label."""
    if HAS_LABELS:
        hard = exp2((s - top_s) * LOG2_E) * over_sum_h
        entries += hard_scale * tl.where(column == label, hard - 1, hard)
    if HAS_SOFTCAP:
        tanh = s * inv_softcap
        entries *= 1 - tanh * tanh
    return entries
