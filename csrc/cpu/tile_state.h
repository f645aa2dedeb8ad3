// The first sweep over a row: the state of one tile, and its exponentials.
#pragma once

#include "../divergence.h"
#include "element.h"

namespace sadkern {
namespace {

using State = RowState<double>;

// What `merge` takes its exponentials with.
struct Exp {
  SADKERN_INLINE double operator()(double x) const { return __builtin_exp(x); }
};

// Sums in fp32, in two levels: the error grows with the length of a run and the number of runs, not
// with their product.
constexpr int kRun = 16 * kLanes;
template <bool kExact>
class Sum {
 public:
  SADKERN_INLINE void add(Vec v) { run_ += v; }
  SADKERN_INLINE void add(Vec a, Vec b) { run_ += a * b; }
  SADKERN_INLINE void end_run() {
    total_ += run_;
    run_ = Vec{};
  }
  SADKERN_INLINE double value() const { return sum(total_ + run_); }

 private:
  Vec run_{}, total_{};
};
// Sums in double.
template <>
class Sum<true> {
 public:
  SADKERN_INLINE void add(Vec v) { total_ += __builtin_convertvector(v, Wide); }
  SADKERN_INLINE void add(Vec a, Vec b) {
    total_ += __builtin_convertvector(a, Wide) * __builtin_convertvector(b, Wide);
  }
  SADKERN_INLINE void end_run() {}
  SADKERN_INLINE double value() const {
    double all = 0;
    for (int i = 0; i < kLanes; ++i) all += total_[i];
    return all;
  }

 private:
  typedef double Wide __attribute__((vector_size(8 * kLanes)));
  Wide total_{};
};

struct Maxima {
  float s, t;
};

// A tile of both sides: n logits each, readable to the end of their last vector.
template <class E>
struct Tile {
  const typename E::Raw *s, *t;
  int n;
};

template <class E>
SADKERN_INLINE Maxima maxima(Tile<E> tile) {
  Vec best_s = splat(-kInf), best_t = splat(-kInf);
  for (int j = 0; j < tile.n; j += kLanes) {
    best_s = max(E::load(tile.s + j), best_s);
    best_t = max(E::load(tile.t + j), best_t);
  }
  return {max(best_s), max(best_t)};
}

// A part that bans all of a side's tokens: any finite centre makes their exponentials 0.
SADKERN_INLINE double finite(double maximum) { return maximum == -kInf ? 0 : maximum; }

// (s - max_s) - (t - max_t) of a part of a row. Where s and t are close their difference is exact;
// where all of s is far from t, that distance goes first.
struct Gap {
  float offset, inv_temperature;
  Vec rest;

  SADKERN_INLINE Gap(double max_s, double max_t, float temperature)
      : inv_temperature(1 / temperature) {
    const double apart = finite(max_s) - finite(max_t);
    const bool close = -1 < apart && apart < 1;
    offset = close ? 0 : apart * temperature;
    rest = splat(apart - double{offset} * inv_temperature);
  }
  SADKERN_INLINE Vec operator()(Vec s, Vec t) const {
    return multiply_subtract((s - offset) - t, inv_temperature, rest);
  }
};

// The state of one tile, its exponentials left in exp_s and exp_t (in exp_t its gaps for reverse KL,
// which needs no p). The maxima of the next tile are found meanwhile: that fetches it, and the
// comparisons fill slots that the polynomials leave. `soften`: sum_h is wanted too.
template <Divergence D, class E>
SADKERN_INLINE State tile_state(Tile<E> tile, Maxima top, float temperature, bool soften, float* exp_s,
                                float* exp_t, Tile<E> next, Maxima& next_top) {
  const auto [s, t, n] = tile;
  const float inv_temperature = 1 / temperature;
  State state = State::empty(-kInf);
  state.max_s = top.s * inv_temperature;
  state.max_t = top.t * inv_temperature;
  const Vec centre_s = splat(finite(state.max_s)), centre_t = splat(finite(state.max_t));
  const Gap gap_of(state.max_s, state.max_t, temperature);
  // The gradient of reverse KL is a small difference from cross_s / sum_s. (sum_t as sum_s: equal
  // sides must have equal sums.)
  Sum<D == Divergence::reverse_kl> sum_s, sum_t, cross_s;
  Sum<false> ent_t, cross_t;
  Vec best_s = splat(-kInf), best_t = splat(-kInf);
  const int next_last = (next.n - 1) / kLanes * kLanes;
  for (int j = 0; j < n; j += kLanes) {
    const int k = j < next_last ? j : next_last;  // the row's last tile is shorter
    best_s = max(E::load(next.s + k), best_s);
    best_t = max(E::load(next.t + k), best_t);
    __builtin_prefetch(next.s + j + kTile, 0, 2);
    __builtin_prefetch(next.t + j + kTile, 0, 2);
    const Vec x_s = multiply_subtract(E::load(s + j), inv_temperature, centre_s);
    const Vec x_t = multiply_subtract(E::load(t + j), inv_temperature, centre_t);
    const Vec e_s = exp<E::kExpDegree>(x_s), e_t = exp<E::kExpDegree>(x_t);
    store(exp_s + j, e_s);
    if constexpr (D != Divergence::reverse_kl) store(exp_t + j, e_t);
    sum_s.add(e_s);
    sum_t.add(e_t);
    // Bounded, so that an exponential of 0 gives a moment of 0; the other side's may be -inf in earnest.
    ent_t.add(e_t, max(splat(kExpFloor), x_t));
    if constexpr (D == Divergence::forward_kl) {
      cross_t.add(e_t, x_t < kExpFloor ? Vec{} : x_t - x_s);
    } else if constexpr (D == Divergence::reverse_kl || D == Divergence::tvd) {
      const Vec gap = gap_of(E::load(s + j), E::load(t + j));
      cross_s.add(e_s, x_s < kExpFloor ? Vec{} : gap);
      if constexpr (D == Divergence::reverse_kl) store(exp_t + j, gap);
      if constexpr (D == Divergence::tvd) cross_t.add(e_t, x_t < kExpFloor ? Vec{} : -gap);
    }
    if ((j + kLanes) % kRun == 0) {
      sum_s.end_run(), cross_s.end_run(), sum_t.end_run(), ent_t.end_run(), cross_t.end_run();
    }
  }
  next_top = {max(best_s), max(best_t)};
  state.sum_s = sum_s.value();
  state.sum_t = sum_t.value();
  state.ent_t = ent_t.value();
  state.cross_t = cross_t.value();
  state.cross_s = cross_s.value();
  if (soften) {
    Vec sum_h{};
    for (int j = 0; j < n; j += kLanes) {
      const Vec x_s = multiply_subtract(E::load(s + j), inv_temperature, centre_s);
      sum_h += exp(x_s * temperature);
    }
    state.sum_h = sum(sum_h);
  }
  return state;
}

}  // namespace
}  // namespace sadkern
