"""The mathematics of one row, as csrc/divergence.h has it: the state that merges, and what each
divergence takes from one vocabulary entry. Everything is fp32.

Notation: s, t student and teacher logits, x_s, x_t the same less their maximum and divided by the
temperature; q = softmax(s), p = softmax(t).
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

FORWARD_KL: tl.constexpr = tl.constexpr("forward_kl")
REVERSE_KL: tl.constexpr = tl.constexpr("reverse_kl")
JSD: tl.constexpr = tl.constexpr("jsd")
SKEW_FORWARD_KL: tl.constexpr = tl.constexpr("skew_forward_kl")
SKEW_REVERSE_KL: tl.constexpr = tl.constexpr("skew_reverse_kl")
TVD: tl.constexpr = tl.constexpr("tvd")


class RowState(NamedTuple):
    """What one read of a part of a row leaves behind. Moments are centred on its own maxima, those
    of a difference on both sides' logits of that token which is likeliest on the side that weighs:
    where it has all of the weight, the difference is then exact."""

    top_s: tl.tensor  # max s
    sum_s: tl.tensor  # sum e^x_s
    top_t: tl.tensor  # max t
    sum_t: tl.tensor  # sum e^x_t
    ent_t: tl.tensor  # sum e^x_t x_t
    cross_t: tl.tensor  # sum e^x_t (x_t - y_s), y_s of s - s_of_top_t as x_s of s - top_s
    cross_s: tl.tensor  # sum e^x_s (x_s - y_t), y_t of t - t_of_top_s
    sum_h: tl.tensor  # sum e^(x_s temperature): the student at temperature 1, for hard labels
    s_of_top_t: tl.tensor  # max s among the entries at max t: max s, if both have the same top
    t_of_top_s: tl.tensor  # max t among the entries at max s


@triton.jit
def empty_state():
    inf = float("inf")
    return RowState(-inf, 0.0, -inf, 0.0, 0.0, 0.0, 0.0, 0.0, -inf, -inf)


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
def recentred(moment, total, by, scale):
    """sum e^x y of a part, whose sum of e^x is `total`, after `by` is added to y and e^x is
    multiplied by `scale`. A part that has no weight then has no moment, and `by` may be -inf.
    (Not `> 0`: a NaN must come through.)"""
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
def state_of(s, t, inv_temperature, DIVERGENCE: tl.constexpr, SOFTEN: tl.constexpr):
    """The state of a tile, in the moments that DIVERGENCE needs."""
    top_s, top_t = tl.max(s), tl.max(t)
    s_of_top_t = tl.max(tl.where(t == top_t, s, -float("inf")))
    t_of_top_s = tl.max(tl.where(s == top_s, t, -float("inf")))
    x_s = (s - finite(top_s)) * inv_temperature
    x_t = (t - finite(top_t)) * inv_temperature
    e_s, e_t = tl.exp(x_s), tl.exp(x_t)
    cross_t = 0.0
    cross_s = 0.0
    sum_h = 0.0
    if DIVERGENCE == FORWARD_KL or DIVERGENCE == REVERSE_KL or DIVERGENCE == TVD:
        y_s = (s - finite(s_of_top_t)) * inv_temperature
        y_t = (t - finite(t_of_top_s)) * inv_temperature
        cross_t = tl.sum(times_unless_zero(e_t, x_t - y_s))
        cross_s = tl.sum(times_unless_zero(e_s, x_s - y_t))
    if SOFTEN:
        sum_h = tl.sum(tl.exp(s - finite(top_s)))
    return RowState(
        top_s, tl.sum(e_s), top_t, tl.sum(e_t), tl.sum(times_unless_zero(e_t, x_t)),
        cross_t, cross_s, sum_h, s_of_top_t, t_of_top_s,
    )  # fmt: skip


@triton.jit
def merge(a, b, inv_temperature):
    """Associative and commutative up to rounding; the empty state is its identity."""
    top_s, top_t = tl.maximum(a.top_s, b.top_s), tl.maximum(a.top_t, b.top_t)
    s_of_top_t = tl.maximum(among_tops(a.top_t, top_t, a.s_of_top_t),
                            among_tops(b.top_t, top_t, b.s_of_top_t))  # fmt: skip
    t_of_top_s = tl.maximum(among_tops(a.top_s, top_s, a.t_of_top_s),
                            among_tops(b.top_s, top_s, b.t_of_top_s))  # fmt: skip
    a = moved(a, top_s, top_t, s_of_top_t, t_of_top_s, inv_temperature)
    b = moved(b, top_s, top_t, s_of_top_t, t_of_top_s, inv_temperature)
    return RowState(
        top_s, a.sum_s + b.sum_s, top_t, a.sum_t + b.sum_t, a.ent_t + b.ent_t,
        a.cross_t + b.cross_t, a.cross_s + b.cross_s, a.sum_h + b.sum_h, s_of_top_t, t_of_top_s,
    )  # fmt: skip


@triton.jit
def among_tops(own, top, other):
    """`other`, if the part's `own` maximum is the whole's."""
    return tl.where(own == top, other, -float("inf"))


@triton.jit
def moved(a, top_s, top_t, s_of_top_t, t_of_top_s, inv_temperature):
    """The state `a` with its moments centred on those of a whole that it is a part of."""
    lower_s, lower_t = below(a.top_s, top_s), below(a.top_t, top_t)
    shift_s, shift_t = lower_s * inv_temperature, lower_t * inv_temperature
    scale_s, scale_t = tl.exp(shift_s), tl.exp(shift_t)
    sum_s, sum_t = a.sum_s * scale_s, a.sum_t * scale_t
    other_s = (finite(a.s_of_top_t) - finite(s_of_top_t)) * inv_temperature
    other_t = (finite(a.t_of_top_s) - finite(t_of_top_s)) * inv_temperature
    ent_t = recentred(a.ent_t, a.sum_t, shift_t, scale_t)
    cross_t = recentred(a.cross_t, a.sum_t, shift_t - other_s, scale_t)
    cross_s = recentred(a.cross_s, a.sum_s, shift_s - other_t, scale_s)
    sum_h = tl.where(sum_s == 0, 0.0, a.sum_h * tl.exp(lower_s))
    return RowState(
        top_s, sum_s, top_t, sum_t, ent_t, cross_t, cross_s, sum_h, s_of_top_t, t_of_top_s
    )  # fmt: skip


# The plain KLs are moments of the state. Of the normalisers only the ratio enters: near 1 its
# logarithm has digits that the difference of two logarithms would lack.


@triton.jit
def gap_under_p(a, inv_temperature):
    """The mean of x_t - x_s under p."""
    return a.cross_t / a.sum_t + (a.top_s - finite(a.s_of_top_t)) * inv_temperature


@triton.jit
def gap_under_q(a, inv_temperature):
    """The mean of x_s - x_t under q."""
    return a.cross_s / a.sum_s + (a.top_t - finite(a.t_of_top_s)) * inv_temperature


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
def teacher_entropy(a):
    return tl.log(a.sum_t) - a.ent_t / a.sum_t


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
