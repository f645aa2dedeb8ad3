// span_kl over logits x logits: loss, diagnostics and gradient of one row per step.
//
// A row is read from memory once. The first sweep, tile by tile, leaves the row's state and, in two
// scratch rows that stay in the cache, the exponentials of both sides relative to their tile's maxima.
// Later sweeps scale those: no exponential is taken twice. The plain KLs write their gradient in the
// second sweep; the other divergences need one more number of the whole row and write it in a third.
//
// Compiled once per instruction set, with SADKERN_ISA naming the entry point.

#include "span_kl.h"

#include <stdlib.h>

#include "row.h"
#include "tile_state.h"

namespace sadkern {
namespace {

template <class E>
struct Math {
  SADKERN_INLINE static Vec log(Vec x) { return sadkern::log<E::kLogDegree>(x); }
  SADKERN_INLINE static Vec abs(Vec x) { return from_bits(bits(x) & 0x7fffffff); }
  SADKERN_INLINE static Vec reciprocal(Vec x) {
    return sadkern::reciprocal(sadkern::max(splat(1e-37f), x));
  }
};

// Of one thread: two rows of whole tiles; per tile its maxima and what turns its exponentials into
// probabilities.
struct Scratch {
  float *exp_s, *exp_t;
  float *tile_s, *tile_t;
  float *to_q, *to_p;
  int64_t tiles;  // rounded up to whole vectors

  explicit Scratch(int64_t row_tiles) : tiles((row_tiles + kLanes - 1) / kLanes * kLanes) {
    const int64_t floats = 2 * (row_tiles * kTile) + 4 * tiles;
    exp_s = static_cast<float*>(aligned_alloc(64, (4 * floats + 63) / 64 * 64));
    exp_t = exp_s + row_tiles * kTile;
    tile_s = exp_t + row_tiles * kTile;
    tile_t = tile_s + tiles;
    to_q = tile_t + tiles;
    to_p = to_q + tiles;
  }
  ~Scratch() { free(exp_s); }
};

template <Divergence D, class E>
class Row : StudentRow<E> {
  using Base = StudentRow<E>;
  using Base::finish, Base::width, Base::scale_, Base::student_, Base::max_s_, Base::inv_temperature_;

 public:
  Row(const SpanKlArgs& a, bool past_caches)
      : Base(a, past_caches), a_(a), scratch_((a.vocab + kTile - 1) / kTile) {}
  bool has_memory() const { return scratch_.exp_s; }

  void read(int64_t i) {
    Base::open(i);
    teacher_.open(row_pointer(a_, a_.teacher, i), a_.vocab);

    const State state = first_sweep();
    const double log_s = __builtin_log(state.sum_s), log_t = __builtin_log(state.sum_t);
    const double log_h = a_.temperature == 1 ? log_s : __builtin_log(state.sum_h);
    Base::normalise(state.max_s, log_h);
    const Vec max_t = splat(state.max_t);
    a_.teacher_entropy[i] = teacher_entropy(state, log_t);
    a_.cross_entropy[i] = Base::cross_entropy(log_h);
    a_.agreement[i] = same_top(max_t);

    const float over_sum_s = 1 / state.sum_s, over_sum_t = 1 / state.sum_t;
    for (int64_t k = 0; k < scratch_.tiles; k += kLanes) {
      store(scratch_.to_q + k, exp(load(scratch_.tile_s + k) - max_s_) * over_sum_s);
      store(scratch_.to_p + k, exp(load(scratch_.tile_t + k) - max_t) * over_sum_t);
    }
    double value;
    if constexpr (D == Divergence::forward_kl) {
      value = forward_kl(state, log_s, log_t);
    } else if constexpr (D == Divergence::reverse_kl) {
      value = reverse_kl(state, log_s, log_t);
      // A tile's gaps are from its own maxima.
      centre_ = mean_gap(state) + state.max_s - state.max_t;
    } else {
      value = second_sweep(state, log_s, log_t);
    }
    a_.per_token[i] = value < 0 ? 0 : value;  // rounding only: a divergence is not negative
  }
  void skip(int64_t i) const {
    a_.per_token[i] = a_.cross_entropy[i] = a_.teacher_entropy[i] = 0;
    a_.agreement[i] = 0;
  }

  void write() const {
    const int64_t end = (a_.vocab + kTile - 1) / kTile;
    // In the other direction than the sweep before: what was touched last is in the nearest cache.
    for (int64_t k = 0; k < end; ++k) write((from_state<D> ? end - 1 - k : k) * kTile);
  }

 private:
  // The gradient of one tile.
  SADKERN_INLINE void write(int64_t begin) const {
    const float *exp_s = scratch_.exp_s + begin, *exp_t = scratch_.exp_t + begin;
    const float to_q = scratch_.to_q[begin / kTile], to_p = scratch_.to_p[begin / kTile];
    const float scale = scale_;
    if constexpr (D == Divergence::forward_kl) {
      // Linear in (p, q): the row's factor goes into the tile's.
      const float weighted_q = to_q * scale, weighted_p = to_p * scale;
      finish(begin, [=](int j) {
        const Vec q = load(exp_s + j) * weighted_q, p = load(exp_t + j) * weighted_p;
        return forward_kl_gradient(p, q);
      });
    } else if constexpr (D == Divergence::reverse_kl) {
      const double tile_s = scratch_.tile_s[begin / kTile], tile_t = scratch_.tile_t[begin / kTile];
      const double centre = centre_ - tile_s + tile_t;
      const Vec high = splat(centre), low = splat(centre - float(centre));
      finish(begin, [=](int j) {
        const Vec q = load(exp_s + j) * to_q;
        return reverse_kl_gradient(q, load(exp_t + j) - high - low) * scale;
      });
    } else {
      const Vec mean_g = splat(centre_);
      finish(begin, [=](int j) {
        const Vec q = load(exp_s + j), g = load(exp_t + j);
        return q * (g - mean_g) * scale;
      });
    }
  }

  SADKERN_INLINE State first_sweep() {
    State state = State::empty(-kInf);
    Maxima top = maxima<E>(tile_at(0));
    for (int64_t begin = 0; begin < a_.vocab; begin += kTile) {
      const int64_t next = begin + kTile < a_.vocab ? begin + kTile : begin;
      const State tile =
          tile_state<D, E>(tile_at(begin), top, a_.temperature, Base::softens(), scratch_.exp_s + begin,
                           scratch_.exp_t + begin, tile_at(next), top);
      scratch_.tile_s[begin / kTile] = tile.max_s;
      scratch_.tile_t[begin / kTile] = tile.max_t;
      state = merge(state, tile, double{a_.temperature}, Exp{});
    }
    return state;
  }

  // The value of a divergence of mixtures; leaves q and g in place of the exponentials.
  SADKERN_INLINE double second_sweep(const State& state, double log_s, double log_t) {
    const Gap gap_of(state.max_s, state.max_t, a_.temperature);
    const float of_sums = log_ratio_of_sums(state, log_s, log_t);  // of tvd, which has both gaps
    double value = 0, mean_g = 0;
    // Backwards, see `write`.
    for (int64_t begin = (a_.vocab - 1) / kTile * kTile; begin >= 0; begin -= kTile) {
      float *exp_s = scratch_.exp_s + begin, *exp_t = scratch_.exp_t + begin;
      const float to_q = scratch_.to_q[begin / kTile], to_p = scratch_.to_p[begin / kTile];
      const auto [s, t, n] = tile_at(begin);
      Sum<false> tile_value, tile_g;
      for (int j = 0; j < n; j += kLanes) {
        // Each rounded by itself: equal logits must give p == q.
        const Vec q = rounded(load(exp_s + j) * to_q), p = rounded(load(exp_t + j) * to_p);
        Vec log_ratio{};
        if constexpr (D == Divergence::tvd) {
          log_ratio = gap_of(E::load(s + j), E::load(t + j)) - of_sums;
        }
        const Term<Vec> one = term<D, Math<E>>(p, q, log_ratio, a_.mix);
        tile_value.add(one.value);
        tile_g.add(q * one.g);
        store(exp_s + j, q);
        store(exp_t + j, one.g);
        if ((j + kLanes) % kRun == 0) tile_value.end_run(), tile_g.end_run();
      }
      value += tile_value.value();
      mean_g += tile_g.value();
    }
    centre_ = mean_g + 0 * value;  // a NaN of the teacher's need not have reached g
    return value;
  }

  // Whether the same entry is on top: looked for only in tiles that hold both sides' maxima.
  SADKERN_INLINE bool same_top(Vec max_t) const {
    VecI found{};
    for (int64_t begin = 0; begin < a_.vocab; begin += kTile) {
      const float tile_s = scratch_.tile_s[begin / kTile], tile_t = scratch_.tile_t[begin / kTile];
      if (tile_s != max_s_[0] || tile_t != max_t[0]) continue;
      const auto [s, t, n] = tile_at(begin);
      for (int j = 0; j < n; j += kLanes) {
        found |= (E::load(s + j) * inv_temperature_ == max_s_) &
                 (E::load(t + j) * inv_temperature_ == max_t);
      }
    }
    return any(found);
  }

  SADKERN_INLINE Tile<E> tile_at(int64_t begin) const {
    return {student_[begin], teacher_[begin], width(begin)};
  }

  const SpanKlArgs& a_;
  const Scratch scratch_;
  Tiles<E> teacher_;
  double centre_ = 0;  // what the gradient subtracts, a mean over the row
};

template <Divergence D>
bool any_dtype(const SpanKlArgs& a, int threads) {
  return with_element(a.dtype, [&](auto e) { return all_rows<Row<D, decltype(e)>>(a, threads); });
}

}  // namespace

bool SADKERN_OF_ISA(span_kl)(const SpanKlArgs& a, int threads) {
  switch (a.divergence) {
    case Divergence::forward_kl: return any_dtype<Divergence::forward_kl>(a, threads);
    case Divergence::reverse_kl: return any_dtype<Divergence::reverse_kl>(a, threads);
    case Divergence::jsd: return any_dtype<Divergence::jsd>(a, threads);
    case Divergence::skew_forward_kl: return any_dtype<Divergence::skew_forward_kl>(a, threads);
    case Divergence::skew_reverse_kl: return any_dtype<Divergence::skew_reverse_kl>(a, threads);
    case Divergence::tvd: return any_dtype<Divergence::tvd>(a, threads);
  }
  return false;
}

}  // namespace sadkern
