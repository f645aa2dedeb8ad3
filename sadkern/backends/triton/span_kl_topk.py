"""span_kl over logits x top-k: loss, diagnostics and gradient of a row at a time.

The teacher's K tokens are buckets of their own and all others are one, the tail. What is wide is
the student's tail, whose sum no subtraction may give: each of the K is marked in a map of the row,
a byte for an entry, and a sweep takes up what is not. The tail's gradient is one factor, written
over the whole row in a second sweep, and the K entries are written after it.

A row with an id twice, or one outside the vocabulary, has a NaN for its loss and its gradient: a
kernel on a device cannot raise.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from sadkern.backends.triton import divergence as of
from sadkern.backends.triton import row as rows

BUCKET: tl.constexpr = tl.constexpr("bucket")
RENORMALIZE: tl.constexpr = tl.constexpr("renormalize")
EPS: tl.constexpr = tl.constexpr(2.0**-23)  # of fp32, as which the teacher's log-probabilities come


class Tail(NamedTuple):
    """sum e^x over tokens that are not the teacher's, at the temperature and (h) without."""

    top: tl.tensor
    sum: tl.tensor
    sum_h: tl.tensor


@triton.jit
def with_group(a, group, rate, SOFTEN: tl.constexpr, TILE: tl.constexpr):
    """As `divergence.with_group`."""
    highest = tl.max(rows.highest(group))
    if highest > a.top:
        lower = a.top - highest
        sum_h = a.sum_h
        if SOFTEN:
            sum_h = a.sum_h * rows.exp2(lower * rows.LOG2_E)
        a = Tail(highest, a.sum * rows.exp2(lower * rate), sum_h)
    sums, sum_h = a.sum, a.sum_h
    for i in tl.static_range(len(group)):
        x = group[i] - of.finite(a.top)
        sums += rows.by_lane(rows.exp2(x * rate), TILE)
        if SOFTEN:
            sum_h += rows.by_lane(rows.exp2(x * rows.LOG2_E), TILE)
    return Tail(a.top, sums, sum_h)


@triton.jit
def is_marked(marks, begin, TILE: tl.constexpr, PACKED: tl.constexpr):
    """Of a tile's entries, whose bytes are set."""
    if PACKED:
        at = begin // 2 + tl.arange(0, TILE // 2)
        two = tl.load(marks.to(tl.pointer_type(tl.int16)) + at)
        return tl.join(two & 0xFF, two >> 8) != 0
    else:
        return tl.load(marks + begin + tl.arange(0, TILE)) != 0


@triton.jit
def weighted(lp, p, x):
    """p x in the limit: nothing where p is 0 in earnest, else infinite where x is."""
    return tl.where(lp == -float("inf"), 0.0, tl.where(x == float("inf"), x, p * x))


@triton.jit
def bucket_term(lp, p, lq, q, mix, DIVERGENCE: tl.constexpr, WHOLE: tl.constexpr):
    """One bucket's share of the value, and its q g. If the buckets are WHOLE distributions, what
    sums to nothing is added and left out as in `divergence.term`; else neither, since the sum may
    leave buckets out."""
    if DIVERGENCE == of.FORWARD_KL:
        value = weighted(lp, p, lp - lq)
        return (value + (q - p) if WHOLE else value), -p
    elif DIVERGENCE == of.REVERSE_KL:
        value = weighted(lq, q, lq - lp)
        return (value + (p - q) if WHOLE else value), value + q
    else:
        value, g = of.term(p, q, lq - lp, mix, DIVERGENCE)
        if not WHOLE and DIVERGENCE == of.SKEW_FORWARD_KL:
            value -= (1 - mix) * (q - p)
        elif not WHOLE and DIVERGENCE == of.SKEW_REVERSE_KL:
            value -= (1 - mix) * (p - q)
            g += 1
        return value, q * g


@triton.jit
def kernel(
    student, student_inner, student_outer, student_stride,  # [..., student_vocab]
    dstudent, dstudent_inner, dstudent_outer, dstudent_stride,  # [..., student_vocab]
    ids,  # [N, K] int32
    logprobs,  # [N, K] fp32
    given_mass, given_entropy,  # [N] fp32
    marks,  # [programs, room] int8
    supervised,  # [N] bool
    row_weights,  # [N] fp32
    labels,  # [N] int64
    per_token, cross_entropy, teacher_entropy,  # [N] fp32
    agreement,  # [N] bool
    tail_mass,  # [N] fp32
    n, k, room, vocab, student_vocab, mix, inv_temperature, ce_weight, inv_softcap,
    DIVERGENCE: tl.constexpr, TAIL: tl.constexpr, HAS_MASS: tl.constexpr,
    HAS_ENTROPY: tl.constexpr, HAS_LABELS: tl.constexpr, SOFTEN: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_GRADIENT: tl.constexpr, K: tl.constexpr,
    TILE: tl.constexpr, TILES: tl.constexpr, PACKED: tl.constexpr, GROUP: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = student.dtype.element_ty
    WIDTH: tl.constexpr = GROUP * TILE
    marks += tl.program_id(0) * room
    rows.zero(marks, 0, room, TILE)
    tl.debug_barrier()
    bucket = tl.arange(0, K)
    rate = inv_temperature * rows.LOG2_E
    groups = tl.cdiv(vocab, WIDTH)
    for row in tl.range(tl.program_id(0), n, tl.num_programs(0)):
        d = rows.row_pointer(dstudent, row, dstudent_inner, dstudent_outer, dstudent_stride)
        if tl.load(supervised + row) == 0:
            rows.skip(
                d, row, student_vocab, per_token, cross_entropy, teacher_entropy, agreement,
                HAS_GRADIENT, TILE,
            )  # fmt: skip
            tl.store(tail_mass + row, 0.0)
        else:
            s = rows.row_pointer(student, row, student_inner, student_outer, student_stride)

            # The teacher's buckets.
            entries = tl.cast(row, tl.int64) * k + bucket
            token = tl.load(ids + entries, mask=bucket < k, other=-1)
            given = (token >= 0) & (token < vocab)
            lp = tl.load(logprobs + entries, mask=given, other=-float("inf"))
            p = tl.exp(lp)
            known = tl.sum(p)
            mass = tl.load(given_mass + row) if HAS_MASS else tl.where(known > 1, 0.0, 1 - known)
            entropy = -tl.sum(of.times_unless_zero(p, lp))
            if TAIL == RENORMALIZE:
                log_known = tl.log(known)
                lp -= log_known
                p = tl.exp(lp)
                entropy = entropy / known + log_known
            elif TAIL == BUCKET:
                entropy -= of.times_unless_zero(mass, tl.log(mass))
            if HAS_ENTROPY:
                entropy = tl.load(given_entropy + row)

            # The student's, and what is left.
            logit = tl.load(s + token, mask=given, other=-float("inf")).to(tl.float32)
            tl.store(marks + token, 1, mask=given)
            tl.debug_barrier()
            tail = Tail(-float("inf"), rows.no_sums(TILE), rows.no_sums(TILE))
            marked = tl.zeros([TILE // 4], tl.int32)
            kept = rows.fetch(s, 0, vocab, TILE, TILES, PACKED)
            for group in tl.range(groups, num_stages=STAGES):
                begin = group * WIDTH
                raw, kept = rows.next_group(kept, s, begin, vocab, GROUP, TILE, TILES, PACKED)
                outside = ()
                for i in tl.static_range(GROUP):
                    inside = is_marked(marks, begin + i * TILE, TILE, PACKED)
                    marked += rows.by_lane(inside.to(tl.int32), TILE)
                    outside += (
                        tl.where(inside, -float("inf"), rows.wide(raw[i], DTYPE, PACKED)),
                    )  # fmt: skip
                tail = with_group(tail, outside, rate, SOFTEN, TILE)
            tail = Tail(tail.top, tl.sum(tail.sum), tl.sum(tail.sum_h))
            twice = tl.sum(marked) != tl.sum(given.to(tl.int32))
            tl.debug_barrier()
            tl.store(marks + token, 0, mask=given)
            tl.debug_barrier()

            top_s = of.finite(tl.maximum(tail.top, tl.max(logit)))
            lq = (logit - top_s) * inv_temperature
            q = tl.exp(lq)
            below = (tail.top - top_s) * inv_temperature
            sum_s = tl.sum(q) + tail.sum * tl.exp(below)
            log_sum = tl.log(sum_s)
            lq -= log_sum
            q = tl.exp(lq)  # as exact as its logarithm: what is wrong with both cancels
            lq_tail = below + tl.log(tail.sum) - log_sum
            q_tail = tl.exp(lq_tail)
            sum_h = sum_s
            if SOFTEN:
                sum_h = tl.sum(tl.exp(logit - top_s)) + tail.sum_h * tl.exp(tail.top - top_s)

            whole: tl.constexpr = TAIL == BUCKET or TAIL == RENORMALIZE
            values, qg = bucket_term(lp, p, lq, q, mix, DIVERGENCE, whole)
            value, total = tl.sum(values), tl.sum(qg)
            qg_tail = 0.0
            if whole:
                # A student without a tail cannot be infinitely far from a teacher's that is only
                # rounding.
                rounding = (tl.sum(given.to(tl.int32)) == vocab) | (mass <= k * EPS)
                p_tail = mass
                if TAIL == RENORMALIZE:
                    p_tail = 0.0
                p_tail = tl.where((q_tail == 0) & rounding, 0.0, p_tail)
                value_tail, qg_tail = bucket_term(
                    tl.log(p_tail), p_tail, lq_tail, q_tail, mix, DIVERGENCE, whole
                )
                value, total = value + value_tail, total + qg_tail
                value = tl.where(value < 0, 0.0, value)  # rounding only
            outside_vocab = tl.max(((token >= vocab) | (token < -1)).to(tl.int32)) > 0
            value = tl.where(twice | outside_vocab, float("nan"), value)
            total = tl.where(value == value, total, float("nan"))  # a NaN need not have reached it

            label, hard = rows.hard_label(labels, row, s, top_s, sum_h, HAS_LABELS)
            agree = given & (lp == tl.max(lp)) & (logit == top_s)
            tl.store(per_token + row, value)
            tl.store(cross_entropy + row, hard)
            tl.store(teacher_entropy + row, entropy)
            tl.store(agreement + row, tl.max(agree.to(tl.int32)))
            tl.store(tail_mass + row, mass)

            if HAS_GRADIENT:
                weight = tl.load(row_weights + row)
                scale = weight * inv_temperature
                hard_scale = tl.where(label >= 0, weight * ce_weight, 0.0)
                # The tail's gradient goes to its tokens as its probability does; without any there
                # is none.
                to_tail = tl.where(tail.sum == 0, 0.0, (qg_tail - q_tail * total) / tail.sum)
                for group in tl.range(groups, num_stages=STAGES):
                    first = (group if TILES else groups - 1 - group) * WIDTH
                    raw, kept = rows.next_group(kept, s, first, vocab, GROUP, TILE, TILES, PACKED)
                    for i in tl.static_range(GROUP):
                        begin = first + i * TILE
                        logits = rows.wide(raw[i], DTYPE, PACKED)
                        # (The marked ones may be far above: there, too, a finite number.)
                        x = tl.minimum((logits - of.finite(tail.top)) * rate, 0.0)
                        out = rows.finish(
                            rows.exp2(x) * (to_tail * scale), logits,
                            rows.columns(begin, TILE, PACKED), label, hard_scale, top_s, 1 / sum_h,
                            inv_softcap, HAS_LABELS, HAS_SOFTCAP,
                        )  # fmt: skip
                        rows.store(d, begin, vocab, out, TILE)
                tl.debug_barrier()
                out = rows.finish(
                    (qg - q * total) * scale, logit, token, label, hard_scale, top_s, 1 / sum_h,
                    inv_softcap, HAS_LABELS, HAS_SOFTCAP,
                )  # fmt: skip
                tl.store(d + token, out.to(d.dtype.element_ty), mask=given)
                rows.zero(d, vocab, student_vocab, TILE)
