// The mathematics of one row, shared by every kernel: the state that merges, and what each
// divergence takes from one vocabulary entry. Written for R = float and for SIMD vectors alike.
//
// Notation: s, t student and teacher logits after temperature; q = softmax(s), p = softmax(t);
// lq = log q, lp = log p.
#pragma once

#ifdef __CUDACC__
#define SADKERN_INLINE __host__ __device__ __forceinline__
#else
#define SADKERN_INLINE inline __attribute__((always_inline))
#endif

namespace sadkern {

enum class Divergence : int {
  forward_kl,
  reverse_kl,
  jsd,
  skew_forward_kl,
  skew_reverse_kl,
  tvd,
};

// What one read of a part of a row leaves behind. Moments are centred on the part's own maxima:
// a large common offset of the logits then costs them nothing.
template <class R>
struct RowState {
  R max_s, sum_s;  // max s,  sum e^(s - max_s)
  R max_t, sum_t;  // max t,  sum e^(t - max_t)
  R ent_t;         // sum e^(t - max_t) (t - max_t)
  R cross_t;       // sum e^(t - max_t) ((t - max_t) - (s - max_s))
  R cross_s;       // sum e^(s - max_s) ((s - max_s) - (t - max_t))
  R sum_h;         // sum e^((s - max_s) T): the student at temperature 1, for hard labels

  SADKERN_INLINE static RowState empty(R neg_inf) { return {neg_inf, 0, neg_inf, 0, 0, 0, 0, 0}; }
};

// Associative and commutative up to rounding; the empty state is its identity.
// `exp` is the caller's, so that device and host use their own.
template <class R, class Exp>
SADKERN_INLINE RowState<R> merge(const RowState<R>& a, const RowState<R>& b, R temperature,
                                 Exp exp) {
  RowState<R> out{};
  out.max_s = a.max_s > b.max_s ? a.max_s : b.max_s;
  out.max_t = a.max_t > b.max_t ? a.max_t : b.max_t;
  const RowState<R>* parts[] = {&a, &b};
  for (const RowState<R>* part : parts) {
    // Equal maxima are tested first: it is the common case, and -inf - -inf is not a number.
    const R shift_s = part->max_s == out.max_s ? 0 : part->max_s - out.max_s;
    const R shift_t = part->max_t == out.max_t ? 0 : part->max_t - out.max_t;
    const R scale_s = shift_s == 0 ? 1 : exp(shift_s);
    const R scale_t = shift_t == 0 ? 1 : exp(shift_t);
    // A part without weight on a side has nothing to say about that side's moments, and its shift
    // may be -inf. (Not `> 0`: a NaN must come through.)
    if (part->sum_s * scale_s != 0) {
      out.sum_s += part->sum_s * scale_s;
      out.cross_s += (part->cross_s + part->sum_s * (shift_s - shift_t)) * scale_s;
      out.sum_h += part->sum_h * (shift_s == 0 ? 1 : exp(shift_s * temperature));
    }
    if (part->sum_t * scale_t != 0) {
      out.sum_t += part->sum_t * scale_t;
      out.ent_t += (part->ent_t + part->sum_t * shift_t) * scale_t;
      out.cross_t += (part->cross_t + part->sum_t * (shift_t - shift_s)) * scale_t;
    }
  }
  return out;
}

template <class R>
SADKERN_INLINE R forward_kl(const RowState<R>& a, R log_s, R log_t) {  // log_x = log sum_x
  return a.cross_t / a.sum_t - log_t + log_s;
}
template <class R>
SADKERN_INLINE R reverse_kl(const RowState<R>& a, R log_s, R log_t) {
  return a.cross_s / a.sum_s - log_s + log_t;
}
template <class R>
SADKERN_INLINE R teacher_entropy(const RowState<R>& a, R log_t) {
  return log_t - a.ent_t / a.sum_t;
}

// x * y, but 0 where x is: the convention 0 log 0 = 0, also where the logarithm is infinite.
template <class R>
SADKERN_INLINE R times_unless_zero(R x, R y) {
  return x == R{} ? R{} : x * y;
}

// The plain KLs are moments of the state: with them known, an entry's gradient needs nothing else.
template <Divergence D>
constexpr bool from_state = D == Divergence::forward_kl || D == Divergence::reverse_kl;

template <class R>
SADKERN_INLINE R forward_kl_gradient(R p, R q) {
  return q - p;
}
// q (log q - log p - KL): the normalisers fall out of that. `centred_gap` is
// (s - max_s) - (t - max_t) less its mean under q, `mean_gap`.
template <class R>
SADKERN_INLINE R reverse_kl_gradient(R q, R centred_gap) {
  return times_unless_zero(q, centred_gap);
}
template <class R>
SADKERN_INLINE R mean_gap(const RowState<R>& a) {
  return a.cross_s / a.sum_s;
}

// log sum_s - log sum_t. Between near distributions the mean gaps under p and under q bracket it, and
// their midpoint, off by the third power of the gaps only, is free of the sums' rounding.
template <class R>
SADKERN_INLINE R log_ratio_of_sums(const RowState<R>& a, R log_s, R log_t) {
  const R above = a.cross_s / a.sum_s, below = -a.cross_t / a.sum_t;
  return above - below < R(1e-5) ? (above + below) / 2 : log_s - log_t;
}

// One entry's share of the other divergences, and g = dD/dq, from which
//   dD/ds_j = q_j (g_j - sum_k q_k g_k).
// Terms of g that are constant over the vocabulary fall out and are left out.
template <class R>
struct Term {
  R value, g;
};

// `mix` is beta of jsd or the skew alpha. `log_ratio`, of which tvd alone takes the sign, is log q - log p:
// near p = q that has more digits than q - p; it is NaN or infinite where p or q is 0.
//
// Logarithms are taken of ratios to the mixture: near p = q these are close to 1 and their logarithms
// to 0, where log p - log m would cancel. The skewed KLs carry the difference of their two masses
// (q - p, summing to zero): it cancels to first order what rounding did to the normalisers.
//
// `Math` is the caller's: `log` and `reciprocal`, both finite at 0, and `abs`. Where p or q is NaN, so is
// the value; g need not be.
template <Divergence D, class Math, class R>
SADKERN_INLINE Term<R> term(R p, R q, R log_ratio, float mix) {
  static_assert(!from_state<D>);
  const float rest = 1 - mix;
  if constexpr (D == Divergence::jsd) {
    const R over_m = Math::reciprocal(rest * q + mix * p);
    const R g = rest * Math::log(q * over_m);
    return {mix * p * Math::log(p * over_m) + q * g, g};
  } else if constexpr (D == Divergence::skew_forward_kl) {
    const R ratio = p * Math::reciprocal(mix * p + rest * q);
    return {p * Math::log(ratio) + rest * (q - p), -rest * ratio};
  } else if constexpr (D == Divergence::skew_reverse_kl) {
    const R ratio = q * Math::reciprocal(mix * q + rest * p);
    const R log_of = Math::log(ratio);
    return {q * log_of + rest * (p - q), log_of - mix * ratio};
  } else {
    const R gap = q - p;
    const R sign = log_ratio > R{} ? R{} + 0.5f : (log_ratio < R{} ? R{} - 0.5f : R{});
    return {0.5f * Math::abs(gap), sign};
  }
}

// The same of one of few buckets, from its probabilities and their logarithms: its share of the value, and
// q g with nothing left out of g, so that a sum may also leave buckets out. For double: nothing is done here
// against cancellation.
template <class R>
struct BucketTerm {
  R value, qg;
};

template <class R, class Math>
SADKERN_INLINE BucketTerm<R> bucket_term(Divergence divergence, R lp, R p, R lq, R q, R mix) {
  const R rest = 1 - mix;
  switch (divergence) {
    case Divergence::forward_kl: return {times_unless_zero(p, lp - lq), -p};
    case Divergence::reverse_kl: {
      const R value = times_unless_zero(q, lq - lp);
      return {value, value + q};
    }
    case Divergence::jsd: {
      const R lm = Math::log(rest * q + mix * p);
      const R qg = rest * times_unless_zero(q, lq - lm);
      return {mix * times_unless_zero(p, lp - lm) + qg, qg};
    }
    case Divergence::skew_forward_kl: {
      const R m = mix * p + rest * q;
      return {times_unless_zero(p, lp - Math::log(m)), -rest * times_unless_zero(p, q / m)};
    }
    case Divergence::skew_reverse_kl: {
      const R m = mix * q + rest * p;
      const R value = times_unless_zero(q, lq - Math::log(m));
      return {value, value + times_unless_zero(q, 1 - mix * q / m)};
    }
    case Divergence::tvd: {
      const R gap = q - p;
      return {Math::abs(gap) / 2, gap > 0 ? q / 2 : gap < 0 ? -q / 2 : gap};
    }
  }
  return {};
}

}  // namespace sadkern
