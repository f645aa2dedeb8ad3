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

struct Math {
  SADKERN_INLINE static Vec log(Vec x) { return sadkern::log(x); }
  SADKERN_INLINE static Vec abs(Vec x) { return from_bits(bits(x) & 0x7fffffff); }
  SADKERN_INLINE static Vec reciprocal(Vec x) { return sadkern::reciprocal(sadkern::max(splat(1e-37f), x)); }
};
struct Exp {
  SADKERN_INLINE double operator()(double x) const { return __builtin_exp(x); }
};

// Of one thread: two rows of whole tiles; per tile its maxima and what turns its exponentials into
// probabilities.
struct Scratch {
  float *exp_s, *exp_t;
  float *tile_s, *tile_t;
  float *to_q, *to_p;
  int64_t tiles;  // rounded up to whole vectors

  explicit Scratch(int64_t row_tiles) : tiles((row_tiles + kLanes - 1) / kLanes * kLanes) {
    exp_s = static_cast<float*>(aligned_alloc(64, 2 * (row_tiles * kTile + 2 * tiles + 16) * 4 / 64 * 64));
    exp_t = exp_s + row_tiles * kTile;
    tile_s = exp_t + row_tiles * kTile;
    tile_t = tile_s + tiles;
    to_q = tile_t + tiles;
    to_p = to_q + tiles;
  }
  ~Scratch() { free(exp_s); }
};

template <Divergence D, class E>
void one_row(const SpanKlArgs& a, int64_t i, const Scratch& scratch, bool past_caches) {
  const Tiles<E> student(row_pointer(a, a.student, i), a.vocab);
  const Tiles<E> teacher(row_pointer(a, a.teacher, i), a.vocab);
  const Gradient<E> gradient(a.dstudent.data ? row_pointer(a, a.dstudent, i) : nullptr, past_caches);
  const int64_t label = a.labels ? a.labels[i] : -1;
  const bool hard = label >= 0;
  const float temperature = a.temperature;
  const float inv_temperature = 1 / temperature;
  auto width = [&](int64_t begin) {
    return static_cast<int>(a.vocab - begin < kTile ? a.vocab - begin : kTile);
  };

  auto tile_at = [&](int64_t begin) -> Tile<E> {
    return {student[begin], teacher[begin], width(begin)};
  };

  State state = State::empty(-kInf);
  Maxima top = maxima<E>(tile_at(0));
  for (int64_t begin = 0; begin < a.vocab; begin += kTile) {
    const int64_t next = begin + kTile < a.vocab ? begin + kTile : begin;
    const State tile = tile_state<D, E>(tile_at(begin), top, temperature, hard && temperature != 1,
                                        scratch.exp_s + begin, scratch.exp_t + begin, tile_at(next), top);
    scratch.tile_s[begin / kTile] = tile.max_s;
    scratch.tile_t[begin / kTile] = tile.max_t;
    state = merge(state, tile, double{temperature}, Exp{});
  }
  const double log_s = __builtin_log(state.sum_s), log_t = __builtin_log(state.sum_t);
  const double log_h = temperature == 1 ? log_s : __builtin_log(state.sum_h);
  const float lse_h = log_h;
  const Vec max_s = splat(state.max_s), max_t = splat(state.max_t);
  // A side's logits less its maximum.
  auto below = [&](const typename E::Raw* logits, Vec maximum) {
    return multiply_subtract(E::load(logits), inv_temperature, maximum);
  };

  a.teacher_entropy[i] = teacher_entropy(state, log_t);
  a.cross_entropy[i] = 0;
  if (hard) {
    const Vec near = below(student[label / kTile * kTile] + label % kTile / kLanes * kLanes, max_s);
    a.cross_entropy[i] = log_h - double{near[label % kLanes]} * temperature;
  }
  // The same top entry: looked for only in tiles that hold both rows' maxima.
  VecI same_top{};
  for (int64_t begin = 0; begin < a.vocab; begin += kTile) {
    if (scratch.tile_s[begin / kTile] != max_s[0] || scratch.tile_t[begin / kTile] != max_t[0]) continue;
    for (int j = 0; j < width(begin); j += kLanes) {
      same_top |= (E::load(student[begin] + j) * inv_temperature == max_s) &
                  (E::load(teacher[begin] + j) * inv_temperature == max_t);
    }
  }
  a.agreement[i] = any(same_top);

  const float over_sum_s = 1 / state.sum_s, over_sum_t = 1 / state.sum_t;
  for (int64_t k = 0; k < scratch.tiles; k += kLanes) {
    const Vec shift_s = load(scratch.tile_s + k) - max_s, shift_t = load(scratch.tile_t + k) - max_t;
    store(scratch.to_q + k, exp(shift_s) * over_sum_s);
    store(scratch.to_p + k, exp(shift_t) * over_sum_t);
  }
  const float scale = a.row_weights[i] * inv_temperature;
  const float hard_scale = a.row_weights[i] * a.ce_weight;
  // Writes a tile's gradient, the hard label's added.
  auto finish = [&](int64_t begin, auto entries) {
    if (!hard) return gradient.write(begin, width(begin), entries);
    gradient.write(begin, width(begin), [&](int j) {
      const Vec q = exp(below(student[begin] + j, max_s) * temperature - lse_h);
      const VecI here = lane_indices() + (int)(begin + j) == (int)label;
      return entries(j) + hard_scale * (here ? q - 1.0f : q);
    });
  };

  // Backwards: what was touched last is still in the nearest cache.
  const int64_t last = (a.vocab - 1) / kTile * kTile;
  if constexpr (from_state<D>) {
    const float value = D == Divergence::forward_kl ? forward_kl(state, log_s, log_t)
                                                    : reverse_kl(state, log_s, log_t);
    a.per_token[i] = value < 0 ? 0 : value;  // rounding only: a KL is not negative
    if (!gradient) return;
    for (int64_t begin = last; begin >= 0; begin -= kTile) {
      const float *exp_s = scratch.exp_s + begin, *exp_t = scratch.exp_t + begin;
      const float to_q = scratch.to_q[begin / kTile], to_p = scratch.to_p[begin / kTile];
      if constexpr (D == Divergence::forward_kl) {
        // Linear in (p, q): the row's factor goes into the tile's.
        const float weighted_q = to_q * scale, weighted_p = to_p * scale;
        finish(begin, [=](int j) {
          const Vec q = load(exp_s + j) * weighted_q, p = load(exp_t + j) * weighted_p;
          return forward_kl_gradient(p, q);
        });
      } else {
        // Gaps as the first sweep took them: a token that has nearly all of q is then its mean gap to
        // the last bit.
        const auto *s = student[begin], *t = teacher[begin];
        const double tile_s = scratch.tile_s[begin / kTile], tile_t = scratch.tile_t[begin / kTile];
        const Gap gap_of(tile_s, tile_t, temperature);
        const double centre = mean_gap(state) + (state.max_s - tile_s) - (state.max_t - tile_t);
        const Vec high = splat(centre), low = splat(centre - float(centre));
        finish(begin, [=](int j) {
          const Vec q = load(exp_s + j) * to_q;
          const Vec gap = gap_of(E::load(s + j), E::load(t + j));
          return reverse_kl_gradient(q, gap - high - low) * scale;
        });
      }
    }
  } else {
    const Gap gap_of(state.max_s, state.max_t, temperature);
    const float log_ratio = log_ratio_of_sums(state, log_s, log_t);
    double value = 0, mean_g = 0;
    for (int64_t begin = last; begin >= 0; begin -= kTile) {
      float *exp_s = scratch.exp_s + begin, *exp_t = scratch.exp_t + begin;
      const float to_q = scratch.to_q[begin / kTile], to_p = scratch.to_p[begin / kTile];
      const auto *s = student[begin], *t = teacher[begin];
      Sum<false> tile_value, tile_g;
      for (int j = 0; j < width(begin); j += kLanes) {
        // Each rounded by itself: equal logits must give p == q.
        const Vec q = rounded(load(exp_s + j) * to_q), p = rounded(load(exp_t + j) * to_p);
        const Vec gap = gap_of(E::load(s + j), E::load(t + j));
        const Term<Vec> one = term<D, Math>(p, q, gap - log_ratio, a.mix);
        tile_value.add(one.value);
        tile_g.add(q * one.g);
        store(exp_s + j, q);  // in place of the exponentials: q and g
        store(exp_t + j, one.g);
        if ((j + kLanes) % kRun == 0) tile_value.end_run(), tile_g.end_run();
      }
      value += tile_value.value();
      mean_g += tile_g.value();
    }
    a.per_token[i] = value < 0 ? 0 : value;
    if (!gradient) return;
    const Vec centre_g = splat(mean_g);
    for (int64_t begin = 0; begin < a.vocab; begin += kTile) {
      const float *q = scratch.exp_s + begin, *g = scratch.exp_t + begin;
      finish(begin, [=](int j) { return load(q + j) * (load(g + j) - centre_g) * scale; });
    }
  }
}

void zero_entries(const SpanKlArgs& a, int64_t i, int64_t from) {
  if (!a.dstudent.data) return;
  char* row = row_pointer(a, a.dstudent, i);
  memset(row + from * size_of(a.dtype), 0, (a.student_vocab - from) * size_of(a.dtype));
}

template <Divergence D, class E>
bool all_rows(const SpanKlArgs& a, int threads) {
  int64_t rows = 1, supervised = 0;
  for (int d = 0; d < a.leading; ++d) rows *= a.sizes[d];
  for (int64_t i = 0; i < rows; ++i) supervised += a.supervised[i] != 0;
  // A gradient that no cache could hold until it is used goes straight to memory.
  const bool past_caches = a.dstudent.data != a.student.data &&
                           supervised * a.vocab * size_of(a.dtype) > (int64_t{8} << 20);
  const int group = static_cast<int>(a.vocab < 65536 ? 65536 / a.vocab : 1);
  bool complete = true;
#pragma omp parallel num_threads(threads) reduction(&& : complete)
  {
    const Scratch scratch((a.vocab + kTile - 1) / kTile);
    complete = scratch.exp_s != nullptr;
    // Short rows in groups: the fetching ahead of a row's end then serves the next one.
#pragma omp for schedule(dynamic, group)
    for (int64_t i = 0; i < rows; ++i) {
      if (!complete) continue;
      if (a.supervised[i]) {
        one_row<D, E>(a, i, scratch, past_caches);
        if (a.student_vocab > a.vocab) zero_entries(a, i, a.vocab);
      } else {
        a.per_token[i] = a.cross_entropy[i] = a.teacher_entropy[i] = 0;
        a.agreement[i] = 0;
        zero_entries(a, i, 0);
      }
    }
    stream_fence();
  }
  return complete;
}

template <Divergence D>
bool any_dtype(const SpanKlArgs& a, int threads) {
  switch (a.dtype) {
    case DType::float32: return all_rows<D, Float32>(a, threads);
    case DType::bfloat16: return all_rows<D, BFloat16>(a, threads);
    case DType::float16: return all_rows<D, Float16>(a, threads);
  }
  return false;
}

}  // namespace

#define SADKERN_JOIN_(a, b) a##b
#define SADKERN_JOIN(a, b) SADKERN_JOIN_(a, b)

bool SADKERN_JOIN(span_kl_, SADKERN_ISA)(const SpanKlArgs& a, int threads) {
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
