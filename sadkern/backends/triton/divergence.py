"""The mathematics of one row, as csrc/divergence.h has it: the state that merges, and what each
divergence takes from one vocabulary entry. Everything is fp32.

Notation: s, t student and teacher logits, x_s, x_t the same less their maximum; q = softmax(s / T),
p = softmax(t / T) at the temperature T, of which `inv_temperature` is 1 / T and `rate` log2(e) / T:
e^(x / T) is 2^(x rate).
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from sadkern.backends.triton import row as rows

FORWARD_KL: tl.constexpr = tl.constexpr("forward_kl")
REVERSE_KL: tl.constexpr = tl.constexpr("reverse_kl")
JSD: tl.constexpr = tl.constexpr("jsd")
SKEW_FORWARD_KL: tl.constexpr = tl.constexpr("skew_forward_kl")
SKEW_REVERSE_KL: tl.constexpr = tl.constexpr("skew_reverse_kl")
TVD: tl.constexpr = tl.constexpr("tvd")


class RowState(NamedTuple):
    """What was read of a row leaves behind. Moments are centred on its maxima, those of a
    difference on both sides' logits of that token which is likeliest on the side that weighs: where
    it has all of the weight, the difference is then exact. Sums are of each lane's entries until
    `whole` adds them up."""

    top_s: tl.tensor  # max s
    sum_s: tl.tensor  # sum e^(x_s / T)
    top_t: tl.tensor  # max t
    sum_t: tl.tensor  # sum e^(x_t / T)
    ent_t: tl.tensor  # sum e^(x_t / T) x_t
    cross_t: tl.tensor  # sum e^(x_t / T) (x_t - y_s), y_s = s - s_of_top_t
    cross_s: tl.tensor  # sum e^(x_s / T) (x_s - y_t), y_t = t - t_of_top_s
    sum_h: tl.tensor  # sum e^x_s: the student at temperature 1, for hard labels
    s_of_top_t: tl.tensor  # max s among the entries at max t: max s, if both have the same top
    t_of_top_s: tl.tensor  # max t among the entries at max s


@triton.jit
def empty_state(TILE: tl.constexpr):
    inf = float("inf")
    none = rows.no_sums(TILE)
    return RowState(-inf, none, -inf, none, none, none, none, none, -inf, -inf)


@triton.jit
def times_unless_zero(x, y):
    """x y, but 0 where x is: the convention 0 log 0 = 0, also where the logarithm is infinite."""
    return tl.where(x == 0, 0.0, x * y)


@triton.jit
def finite(top):
    """A part that bans all tokens: any finite centre makes their exponentials 0."""
    return tl.where(top == -float("inf"), 0.0, top)


@triton.jit
def below(part, whole):
    """A part's maximum less that of the whole: 0 where they are equal, be it at -inf."""
    return tl.where(part == whole, 0.0, part - whole)


@triton.jit
def moved(moment, total, by, scale):
    """sum e y of a part, whose sum of e is `total`, after `by` is added to y and e is multiplied by
    `scale`. A part that has no weight then has no moment, and `by` may be -inf. (Not `> 0`: a NaN
    must come through.)"""
    return tl.where(total * scale == 0, 0.0, (moment + total * by) * scale)


@triton.jit
def log(x):
    """log x for normal x > 0, without a branch and with all digits near 1: of x = 2^n (1 + f) it is
    n log 2 + f + f^2 Q(f), the polynomial that csrc/cpu/simd.h has. log 0 comes out as about -88, a
    number that 0 can be multiplied by; of a NaN, too, some number does.
    """
    bits = x.to(tl.int32, bitcast=True)
    n = (bits - 0x3F3504F3) >> 23
    f = (bits - (n << 23)).to(tl.float32, bitcast=True) - 1.0
    poly = tl.fma(f, 8.734845370e-2, -1.430752277e-1)
    poly = tl.fma(poly, f, 1.491797268e-1)
    poly = tl.fma(poly, f, -1.657050848e-1)
    poly = tl.fma(poly, f, 1.996207237e-1)
    poly = tl.fma(poly, f, -2.500175536e-1)
    poly = tl.fma(poly, f, 3.333395123e-1)
    poly = tl.fma(poly, f, -4.999999106e-1)
    return tl.fma(n.to(tl.float32), 0.693147181, tl.fma(f * f, poly, f))


@triton.jit
def pair_max(a_s, a_t, b_s, b_t):
    return tl.maximum(a_s, b_s), tl.maximum(a_t, b_t)


@triton.jit
def tops_of(group_s, group_t, TILE: tl.constexpr):
    """Both maxima, for which the warps meet once."""
    s, t = group_s[0], group_t[0]
    for i in tl.static_range(1, len(group_s)):
        s, t = pair_max(s, t, group_s[i], group_t[i])
    return tl.reduce((tl.reshape(s, [TILE]), tl.reshape(t, [TILE])), 0, pair_max)


@triton.jit
def with_group(a, group_s, group_t, rate, DIVERGENCE: tl.constexpr, SOFTEN: tl.constexpr,
               TILE: tl.constexpr):  # fmt: skip
    """The state `a` after another group of wide tiles, in the moments that DIVERGENCE needs."""
    CROSS: tl.constexpr = DIVERGENCE == FORWARD_KL or DIVERGENCE == REVERSE_KL or DIVERGENCE == TVD
    highest_s, highest_t = tops_of(group_s, group_t, TILE)
    if (highest_s >= a.top_s) | (highest_t >= a.top_t):  # as few groups have it
        a = recentred(a, group_s, group_t, highest_s, highest_t, rate, CROSS, SOFTEN)
    for i in tl.static_range(len(group_s)):
        a = with_tile(a, group_s[i], group_t[i], rate, CROSS, SOFTEN, TILE)
    return a


@triton.jit
def with_tile(a, s, t, rate, CROSS: tl.constexpr, SOFTEN: tl.constexpr, TILE: tl.constexpr):
    """The state `a` after another tile that is nowhere above its maxima."""
    x_s, x_t = s - finite(a.top_s), t - finite(a.top_t)
    e_s, e_t = rows.exp2(x_s * rate), rows.exp2(x_t * rate)
    cross_t, cross_s, sum_h = a.cross_t, a.cross_s, a.sum_h
    if CROSS:
        y_s, y_t = s - finite(a.s_of_top_t), t - finite(a.t_of_top_s)
        cross_t += rows.by_lane(times_unless_zero(e_t, x_t - y_s), TILE)
        cross_s += rows.by_lane(times_unless_zero(e_s, x_s - y_t), TILE)
    if SOFTEN:
        sum_h += rows.by_lane(rows.exp2(x_s * rows.LOG2_E), TILE)
    return RowState(
        a.top_s, a.sum_s + rows.by_lane(e_s, TILE), a.top_t, a.sum_t + rows.by_lane(e_t, TILE),
        a.ent_t + rows.by_lane(times_unless_zero(e_t, x_t), TILE),
        cross_t, cross_s, sum_h, a.s_of_top_t, a.t_of_top_s,
    )  # fmt: skip


@triton.jit
def whole(a):
    """The state with its lanes added up."""
    return RowState(
        a.top_s, tl.sum(a.sum_s), a.top_t, tl.sum(a.sum_t), tl.sum(a.ent_t), tl.sum(a.cross_t),
        tl.sum(a.cross_s), tl.sum(a.sum_h), a.s_of_top_t, a.t_of_top_s,
    )  # fmt: skip


@triton.jit
def among_tops(own, top, other):
    """`other`, if the part's `own` maximum is the whole's."""
    return tl.where(own == top, other, -float("inf"))


@triton.jit
def recentred(a, group_s, group_t, highest_s, highest_t, rate, CROSS: tl.constexpr,
              SOFTEN: tl.constexpr):  # fmt: skip
    """The state `a` with its moments centred on the maxima of it and a group together."""
    top_s, top_t = tl.maximum(a.top_s, highest_s), tl.maximum(a.top_t, highest_t)
    lower_s, lower_t = below(a.top_s, top_s), below(a.top_t, top_t)
    scale_s, scale_t = rows.exp2(lower_s * rate), rows.exp2(lower_t * rate)
    s_of_top_t = among_tops(a.top_t, top_t, a.s_of_top_t)
    t_of_top_s = among_tops(a.top_s, top_s, a.t_of_top_s)
    for i in tl.static_range(len(group_s)):
        s, t = group_s[i], group_t[i]
        s_of_top_t = tl.maximum(s_of_top_t, tl.max(among_tops(t, top_t, s)))
        t_of_top_s = tl.maximum(t_of_top_s, tl.max(among_tops(s, top_s, t)))
    cross_t, cross_s, sum_h = a.cross_t, a.cross_s, a.sum_h
    if CROSS:
        other_s = finite(a.s_of_top_t) - finite(s_of_top_t)
        other_t = finite(a.t_of_top_s) - finite(t_of_top_s)
        cross_t = moved(a.cross_t, a.sum_t, lower_t - other_s, scale_t)
        cross_s = moved(a.cross_s, a.sum_s, lower_s - other_t, scale_s)
    if SOFTEN:
        sum_h = tl.where(a.sum_s * scale_s == 0, 0.0, a.sum_h * rows.exp2(lower_s * rows.LOG2_E))
    return RowState(
        top_s, a.sum_s * scale_s, top_t, a.sum_t * scale_t,
        moved(a.ent_t, a.sum_t, lower_t, scale_t), cross_t, cross_s, sum_h, s_of_top_t, t_of_top_s,
    )  # fmt: skip


# The plain KLs are moments of the state. Of the normalisers only the ratio enters: near 1 its
# logarithm has digits that the difference of two logarithms would lack.


@triton.jit
def gap_under_p(a, inv_temperature):
    """The mean of (x_t - x_s) / T under p."""
    return (a.cross_t / a.sum_t + (a.top_s - finite(a.s_of_top_t))) * inv_temperature


@triton.jit
def gap_under_q(a, inv_temperature):
    """The mean of (x_s - x_t) / T under q."""
    return (a.cross_s / a.sum_s + (a.top_t - finite(a.t_of_top_s))) * inv_temperature


@triton.jit
def log_ratio_of_sums(a, inv_temperature):
    """log(sum_s / sum_t). Between near distributions the mean gaps under p and under q bracket it,
    and their midpoint, off by the third power of the gaps only, is free of the sums' rounding."""
    above, below = gap_under_q(a, inv_temperature), -gap_under_p(a, inv_temperature)
    return tl.where(above - below < 1e-5, (above + below) / 2, tl.log(a.sum_s / a.sum_t))


@triton.jit
def forward_kl(a, inv_temperature):
    return gap_under_p(a, inv_temperature) + log_ratio_of_sums(a, inv_temperature)


@triton.jit
def reverse_kl(a, inv_temperature):
    return gap_under_q(a, inv_temperature) - log_ratio_of_sums(a, inv_temperature)


@triton.jit
def teacher_entropy(a, inv_temperature):
    return tl.log(a.sum_t) - a.ent_t / a.sum_t * inv_temperature


@triton.jit
def term(p, q, log_ratio, mix, DIVERGENCE: tl.constexpr):
    """One entry's share of a divergence of mixtures, and g = dD/dq, from which
    dD/ds_j = q_j (g_j - sum_k q_k g_k). What is constant in g falls out and is left out.

    `log_ratio`, of which tvd alone takes the sign, is log q - log p: near p = q that has more
    digits than q - p. Logarithms are taken of ratios to the mixture: near p = q these are close to
    1. The skewed KLs carry the difference of their two masses, which sums to zero: it cancels to
    first order what rounding did to the normalisers.
    """
    rest = 1 - mix
    if DIVERGENCE == JSD:
        over_m = 1 / tl.maximum(rest * q + mix * p, 1e-37)
        g = rest * log(q * over_m)
        value = mix * p * log(p * over_m) + q * g
    elif DIVERGENCE == SKEW_FORWARD_KL:
        ratio = p / tl.maximum(mix * p + rest * q, 1e-37)
        g = -rest * ratio
        value = p * log(ratio) + rest * (q - p)
    elif DIVERGENCE == SKEW_REVERSE_KL:
        ratio = q / tl.maximum(mix * q + rest * p, 1e-37)
        log_of = log(ratio)
        g = log_of - mix * ratio
        value = q * log_of + rest * (p - q)
    else:
        g = tl.minimum(tl.maximum(log_ratio * 1e38, -0.5), 0.5)  # half the sign; no more of a NaN
        value = 0.5 * tl.abs(q - p)
    return value, g
