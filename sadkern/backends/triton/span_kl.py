"""span_kl over logits x logits: loss, diagnostics and gradient of one row per program.

The first sweep over a row leaves its state. The second goes backwards, since the last tiles are
still in the cache, and writes the gradient of the plain KLs; the other divergences need one more
number of the whole row and write theirs in a third. A row short enough (of TILES > 0 tiles) is kept
on chip meanwhile and read once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sadkern.backends.triton import divergence as of
from sadkern.backends.triton import row as rows


@triton.jit
def terms(s, t, state, log_ratio, mix, inv_temperature, DIVERGENCE: tl.constexpr):
    """Of a tile of logits: its entries' shares of a divergence of mixtures, q and g."""
    x_s, x_t = (s - state.top_s) * inv_temperature, (t - state.top_t) * inv_temperature
    q, p = tl.exp(x_s) * (1 / state.sum_s), tl.exp(x_t) * (1 / state.sum_t)
    value, g = of.term(p, q, (x_s - x_t) - log_ratio, mix, DIVERGENCE)
    return value, q, g


@triton.jit
def gradient(s, t, state, centre, log_ratio, mix, inv_temperature, DIVERGENCE: tl.constexpr):
    """Of a tile, with respect to the student's logits over the temperature."""
    if DIVERGENCE == of.FORWARD_KL or DIVERGENCE == of.REVERSE_KL:
        x_s = (s - state.top_s) * inv_temperature
        q = tl.exp(x_s) * (1 / state.sum_s)
        if DIVERGENCE == of.FORWARD_KL:
            return q - tl.exp((t - state.top_t) * inv_temperature) * (1 / state.sum_t)
        else:
            y_t = (t - of.finite(state.t_of_top_s)) * inv_temperature
            return of.times_unless_zero(q, (x_s - y_t) - centre)
    else:
        _, q, g = terms(s, t, state, log_ratio, mix, inv_temperature, DIVERGENCE)
        return q * (g - centre)


@triton.jit
def kernel(
    student, student_inner, student_outer, student_stride,  # [..., student_vocab]
    teacher, teacher_inner, teacher_outer, teacher_stride,  # [..., >= vocab]
    dstudent, dstudent_inner, dstudent_outer, dstudent_stride,  # [..., student_vocab]
    supervised,  # [N] bool
    row_weights,  # [N] fp32
    labels,  # [N] int64
    per_token, cross_entropy, teacher_entropy,  # [N] fp32
    agreement,  # [N] bool
    vocab, student_vocab, mix, inv_temperature, ce_weight, inv_softcap,
    DIVERGENCE: tl.constexpr, HAS_LABELS: tl.constexpr, SOFTEN: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_GRADIENT: tl.constexpr,
    TILE: tl.constexpr, TILES: tl.constexpr, PACKED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    d = rows.row_pointer(dstudent, row, dstudent_inner, dstudent_outer, dstudent_stride)
    if tl.load(supervised + row) == 0:
        rows.skip(
            d, row, student_vocab, per_token, cross_entropy, teacher_entropy, agreement,
            HAS_GRADIENT, TILE,
        )  # fmt: skip
        return
    s = rows.row_pointer(student, row, student_inner, student_outer, student_stride)
    t = rows.row_pointer(teacher, row, teacher_inner, teacher_outer, teacher_stride)
    DTYPE: tl.constexpr = student.dtype.element_ty
    FROM_STATE: tl.constexpr = DIVERGENCE == of.FORWARD_KL or DIVERGENCE == of.REVERSE_KL
    tiles = tl.cdiv(vocab, TILE)

    state = of.empty_state()
    kept_s = rows.room(s, TILE, TILES, PACKED)
    kept_t = rows.room(t, TILE, TILES, PACKED)
    for k in tl.range(tiles, num_stages=STAGES):
        raw_s = rows.load(s, k * TILE, vocab, TILE, PACKED)
        raw_t = rows.load(t, k * TILE, vocab, TILE, PACKED)
        kept_s, kept_t = rows.keep(kept_s, raw_s, TILES), rows.keep(kept_t, raw_t, TILES)
        tile_s, tile_t = rows.wide(raw_s, DTYPE, PACKED), rows.wide(raw_t, DTYPE, PACKED)
        tile = of.state_of(tile_s, tile_t, inv_temperature, DIVERGENCE, SOFTEN)
        state = of.merge(state, tile, inv_temperature)

    centre = 0.0  # what the gradient subtracts, a mean over the row
    log_ratio = 0.0
    if DIVERGENCE == of.FORWARD_KL:
        value = of.forward_kl(state, inv_temperature)
    elif DIVERGENCE == of.REVERSE_KL:
        value = of.reverse_kl(state, inv_temperature)
        centre = state.cross_s / state.sum_s
    else:
        value = 0.0
        if DIVERGENCE == of.TVD:
            log_ratio = of.log_ratio_of_sums(state, inv_temperature)
        for k in tl.range(tiles, num_stages=STAGES):
            begin = (k if TILES else tiles - 1 - k) * TILE
            raw_s, kept_s = rows.next_tile(kept_s, s, begin, vocab, TILE, TILES, PACKED)
            raw_t, kept_t = rows.next_tile(kept_t, t, begin, vocab, TILE, TILES, PACKED)
            tile_s, tile_t = rows.wide(raw_s, DTYPE, PACKED), rows.wide(raw_t, DTYPE, PACKED)
            more, q, g = terms(tile_s, tile_t, state, log_ratio, mix, inv_temperature, DIVERGENCE)
            value += tl.sum(more)
            centre += tl.sum(q * g)
        centre += 0 * value  # a NaN of the teacher's need not have reached g

    sum_h = state.sum_h if SOFTEN else state.sum_s
    label, hard = rows.hard_label(labels, row, s, state.top_s, sum_h, HAS_LABELS)
    tl.store(per_token + row, tl.where(value < 0, 0.0, value))  # rounding only
    tl.store(cross_entropy + row, hard)
    tl.store(teacher_entropy + row, of.teacher_entropy(state))
    tl.store(agreement + row, state.s_of_top_t == state.top_s)

    if HAS_GRADIENT:
        weight = tl.load(row_weights + row)
        scale = weight * inv_temperature
        hard_scale = tl.where(label >= 0, weight * ce_weight, 0.0)
        for k in tl.range(tiles, num_stages=STAGES):
            begin = (tiles - 1 - k if FROM_STATE and not TILES else k) * TILE
            raw_s, kept_s = rows.next_tile(kept_s, s, begin, vocab, TILE, TILES, PACKED)
            raw_t, kept_t = rows.next_tile(kept_t, t, begin, vocab, TILE, TILES, PACKED)
            tile_s, tile_t = rows.wide(raw_s, DTYPE, PACKED), rows.wide(raw_t, DTYPE, PACKED)
            entries = scale * gradient(
                tile_s, tile_t, state, centre, log_ratio, mix, inv_temperature, DIVERGENCE
            )
            entries = rows.finish(
                entries, tile_s, rows.columns(begin, TILE, PACKED), label, hard_scale, state.top_s,
                1 / sum_h, inv_softcap, HAS_LABELS, HAS_SOFTCAP,
            )  # fmt: skip
            rows.store(d, begin, vocab, entries, TILE, PACKED)
        rows.zero(d, vocab, student_vocab, TILE)
