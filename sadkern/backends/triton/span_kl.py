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
    rate = inv_temperature * rows.LOG2_E
    x_s, x_t = s - state.top_s, t - state.top_t
    q, p = rows.exp2(x_s * rate) * (1 / state.sum_s), rows.exp2(x_t * rate) * (1 / state.sum_t)
    value, g = of.term(p, q, (x_s - x_t) * inv_temperature - log_ratio, mix, DIVERGENCE)
    return value, q, g


@triton.jit
def gradient(s, t, state, centre, log_ratio, mix, inv_temperature, DIVERGENCE: tl.constexpr):
    """Of a tile, with respect to the student's logits over the temperature."""
    if DIVERGENCE == of.FORWARD_KL or DIVERGENCE == of.REVERSE_KL:
        rate = inv_temperature * rows.LOG2_E
        x_s = s - state.top_s
        e_s = rows.exp2(x_s * rate)
        if DIVERGENCE == of.FORWARD_KL:
            e_t = rows.exp2((t - state.top_t) * rate)
            return e_s * (1 / state.sum_s) - e_t * (1 / state.sum_t)
        else:
            y_t = t - of.finite(state.t_of_top_s)
            q = e_s * (1 / state.sum_s)
            return of.times_unless_zero(q * inv_temperature, (x_s - y_t) - centre)
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
    TILE: tl.constexpr, TILES: tl.constexpr, PACKED: tl.constexpr, GROUP: tl.constexpr,
    STAGES: tl.constexpr,
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
    WIDTH: tl.constexpr = GROUP * TILE
    groups = tl.cdiv(vocab, WIDTH)

    state = of.empty_state(TILE)
    kept_s = rows.fetch(s, 0, vocab, TILE, TILES, PACKED)
    kept_t = rows.fetch(t, 0, vocab, TILE, TILES, PACKED)
    for k in tl.range(groups, num_stages=STAGES):
        raw_s, kept_s = rows.next_group(kept_s, s, k * WIDTH, vocab, GROUP, TILE, TILES, PACKED)
        raw_t, kept_t = rows.next_group(kept_t, t, k * WIDTH, vocab, GROUP, TILE, TILES, PACKED)
        state = of.with_group(
            state, rows.wide_group(raw_s, DTYPE, PACKED), rows.wide_group(raw_t, DTYPE, PACKED),
            inv_temperature * rows.LOG2_E, DIVERGENCE, SOFTEN, TILE,
        )  # fmt: skip
    state = of.whole(state)

    centre = 0.0  # what the gradient subtracts, a mean over the row
    log_ratio = 0.0
    if DIVERGENCE == of.FORWARD_KL:
        value = of.forward_kl(state, inv_temperature)
    elif DIVERGENCE == of.REVERSE_KL:
        value = of.reverse_kl(state, inv_temperature)
        centre = state.cross_s / state.sum_s
    else:
        if DIVERGENCE == of.TVD:
            log_ratio = of.log_ratio_of_sums(state, inv_temperature)
        values = rows.no_sums(TILE)
        centres = rows.no_sums(TILE)
        for k in tl.range(groups, num_stages=STAGES):
            begin = (k if TILES else groups - 1 - k) * WIDTH
            raw_s, kept_s = rows.next_group(kept_s, s, begin, vocab, GROUP, TILE, TILES, PACKED)
            raw_t, kept_t = rows.next_group(kept_t, t, begin, vocab, GROUP, TILE, TILES, PACKED)
            for i in tl.static_range(GROUP):
                more, q, g = terms(
                    rows.wide(raw_s[i], DTYPE, PACKED), rows.wide(raw_t[i], DTYPE, PACKED), state,
                    log_ratio, mix, inv_temperature, DIVERGENCE,
                )  # fmt: skip
                values += rows.by_lane(more, TILE)
                centres += rows.by_lane(q * g, TILE)
        value = tl.sum(values)
        centre = tl.sum(centres) + 0 * value  # a NaN of the teacher's need not have reached g

    sum_h = state.sum_h if SOFTEN else state.sum_s
    label, hard = rows.hard_label(labels, row, s, state.top_s, sum_h, HAS_LABELS)
    tl.store(per_token + row, tl.where(value < 0, 0.0, value))  # rounding only
    tl.store(cross_entropy + row, hard)
    tl.store(teacher_entropy + row, of.teacher_entropy(state, inv_temperature))
    tl.store(agreement + row, state.s_of_top_t == state.top_s)

    if HAS_GRADIENT:
        weight = tl.load(row_weights + row)
        scale = weight * inv_temperature
        hard_scale = tl.where(label >= 0, weight * ce_weight, 0.0)
        for k in tl.range(groups, num_stages=STAGES):
            begin = (groups - 1 - k if FROM_STATE and not TILES else k) * WIDTH
            raw_s, kept_s = rows.next_group(kept_s, s, begin, vocab, GROUP, TILE, TILES, PACKED)
            raw_t, kept_t = rows.next_group(kept_t, t, begin, vocab, GROUP, TILE, TILES, PACKED)
            for i in tl.static_range(GROUP):
                tile_s, tile_t = (
                    rows.wide(raw_s[i], DTYPE, PACKED), rows.wide(raw_t[i], DTYPE, PACKED),
                )  # fmt: skip
                entries = scale * gradient(
                    tile_s, tile_t, state, centre, log_ratio, mix, inv_temperature, DIVERGENCE
                )
                entries = rows.finish(
                    entries, tile_s, rows.columns(begin + i * TILE, TILE, PACKED), label,
                    hard_scale, state.top_s, 1 / sum_h, inv_softcap, HAS_LABELS, HAS_SOFTCAP,
                )  # fmt: skip
                rows.store(d, begin + i * TILE, vocab, entries, TILE)
        rows.zero(d, vocab, student_vocab, TILE)
