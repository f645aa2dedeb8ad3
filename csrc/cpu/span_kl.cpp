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

#include "tile.h"

namespace sadkern {
namespace {

struct Log {
  SADKERN_INLINE Vec operator()(Vec x) const { return log(x); }
};
struct Exp {
  SADKERN_INLINE double operator()(double x) const { return __builtin_exp(x); }
};

using State = RowState<double>;

// Of one thread: two rows of whole tiles; per tile its maxima, later what turns its exponentials into
// probabilities.
struct Scratch {
  float *exp_s, *exp_t;
  float *tile_s, *tile_t;
  int64_t tiles;  // rounded up to whole vectors

  explicit Scratch(int64_t row_tiles) : tiles((row_tiles + kLanes - 1) / kLanes * kLanes) {
    exp_s = static_cast<float*>(aligned_alloc(64, 2 * (row_tiles * kTile + tiles + 16) * 4 / 64 * 64));
    exp_t = exp_s + row_tiles * kTile;
    tile_s = exp_t + row_tiles * kTile;
    tile_t = tile_s + tiles;
  }
  ~Scratch() { free(exp_s); }
};

SADKERN_INLINE char* row_pointer(const SpanKlArgs& a, const Rows& rows, int64_t i) {
  int64_t offset = 0;
  for (int d = a.leading - 1; d >= 0; --d) {
    offset += i % a.sizes[d] * rows.strides[d];
    i /= a.sizes[d];
  }
  return static_cast<char*>(rows.data) + offset * size_of(a.dtype);
}

// The state of one tile, its exponentials left in exp_s and exp_t. Maxima first: both tiles are in the
// L1 cache by then. The next tile is fetched meanwhile: next_s, next_t, of `entry` bytes each entry.
template <Divergence D>
SADKERN_INLINE State tile_state(const float* s, const float* t, float* exp_s, float* exp_t,
                                float temperature, bool hard, const char* next_s,
                                const char* next_t, int64_t entry) {
  Vec best_s = splat(-kInf), best_t = splat(-kInf);
  for (int j = 0; j < kTile; j += kLanes) {
    best_s = max(load(s + j), best_s);
    best_t = max(load(t + j), best_t);
  }
  State state = State::empty(-kInf);
  state.max_s = max(best_s);
  state.max_t = max(best_t);
  // A tile of banned tokens only: any finite centre makes its exponentials 0.
  const float centre_s = state.max_s == -kInf ? 0 : max(best_s);
  const float centre_t = state.max_t == -kInf ? 0 : max(best_t);
  Vec sum_s{}, sum_t{}, ent_t{}, cross_t{}, cross_s{};
  for (int j = 0; j < kTile; j += kLanes) {
    __builtin_prefetch(next_s + j * entry);
    __builtin_prefetch(next_t + j * entry);
    const Vec x_s = load(s + j) - centre_s, x_t = load(t + j) - centre_t;
    const Vec e_s = exp(x_s), e_t = exp(x_t);
    store(exp_s + j, e_s);
    store(exp_t + j, e_t);
    sum_s += e_s;
    sum_t += e_t;
    // Bounded, so that an exponential of 0 gives a moment of 0; the other side's may be -inf in earnest.
    const Vec low = splat(kExpFloor);
    ent_t += e_t * max(low, x_t);
    if constexpr (D == Divergence::forward_kl) {
      cross_t = e_t > 0.0f ? cross_t + e_t * (x_t - x_s) : cross_t;
    } else if constexpr (D == Divergence::reverse_kl) {
      cross_s = e_s > 0.0f ? cross_s + e_s * (x_s - x_t) : cross_s;
    }
  }
  state.sum_s = sum(sum_s);
  state.sum_t = sum(sum_t);
  state.ent_t = sum(ent_t);
  state.cross_t = sum(cross_t);
  state.cross_s = sum(cross_s);
  if (hard) {
    Vec sum_h{};
    for (int j = 0; j < kTile; j += kLanes) {
      sum_h += exp((load(s + j) - centre_s) * temperature);
    }
    state.sum_h = sum(sum_h);
  }
  return state;
}

template <Divergence D>
void one_row(const SpanKlArgs& a, int64_t i, const Scratch& scratch, bool past_caches) {
  const char* student = row_pointer(a, a.student, i);
  const char* teacher = row_pointer(a, a.teacher, i);
  void* dstudent = a.dstudent.data ? row_pointer(a, a.dstudent, i) : nullptr;
  const int64_t label = a.labels ? a.labels[i] : -1;
  const bool hard = label >= 0;
  const float temperature = a.temperature;
  const float inv_temperature = 1 / temperature;
  alignas(64) float buffer_s[kTile], buffer_t[kTile], gradient[kTile];
  auto width = [&](int64_t begin) {
    return static_cast<int>(a.vocab - begin < kTile ? a.vocab - begin : kTile);
  };
  auto load_s = [&](int64_t begin) {
    return load_tile(student, a.dtype, begin, width(begin), inv_temperature, buffer_s);
  };
  auto load_t = [&](int64_t begin) {
    return load_tile(teacher, a.dtype, begin, width(begin), inv_temperature, buffer_t);
  };

  State state = State::empty(-kInf);
  for (int64_t begin = 0; begin < a.vocab; begin += kTile) {
    const int64_t entry = size_of(a.dtype), next = (begin + kTile) * entry;
    const State tile =
        tile_state<D>(load_s(begin), load_t(begin), scratch.exp_s + begin, scratch.exp_t + begin,
                      temperature, hard && temperature != 1, student + next, teacher + next, entry);
    scratch.tile_s[begin / kTile] = tile.max_s;
    scratch.tile_t[begin / kTile] = tile.max_t;
    state = merge(state, tile, double{temperature}, Exp{});
  }
  const double log_s = __builtin_log(state.sum_s), log_t = __builtin_log(state.sum_t);
  const double log_h = temperature == 1 ? log_s : __builtin_log(state.sum_h);
  const float max_s = state.max_s, max_t = state.max_t, lse_h = log_h;
  // log q = (s - max_s) - lse_s, log p = (t - max_t) - lse_t
  const float lse_s = log_s, lse_t = log_t;

  a.teacher_entropy[i] = teacher_entropy(state, log_t);
  a.cross_entropy[i] = 0;
  if (hard) {
    const float logit = load_s(label / kTile * kTile)[label % kTile];
    a.cross_entropy[i] = log_h - double{logit - max_s} * temperature;
  }
  // The same top entry: looked for only in tiles that hold both rows' maxima.
  VecI same_top{};
  for (int64_t begin = 0; begin < a.vocab; begin += kTile) {
    if (scratch.tile_s[begin / kTile] != max_s || scratch.tile_t[begin / kTile] != max_t) continue;
    const float *s = load_s(begin), *t = load_t(begin);
    for (int j = 0; j < kTile; j += kLanes) {
      same_top |= (load(s + j) == max_s) & (load(t + j) == max_t);
    }
  }
  a.agreement[i] = any(same_top);

  const float over_sum_s = 1 / state.sum_s, over_sum_t = 1 / state.sum_t;
  for (int64_t k = 0; k < scratch.tiles; k += kLanes) {
    const Vec below_s = load(scratch.tile_s + k) - max_s, below_t = load(scratch.tile_t + k) - max_t;
    store(scratch.tile_s + k, exp(below_s) * over_sum_s);
    store(scratch.tile_t + k, exp(below_t) * over_sum_t);
  }
  const float scale = a.row_weights[i] * inv_temperature;
  const float hard_scale = a.row_weights[i] * a.ce_weight;
  // Adds the hard label's gradient to a tile's, and stores it.
  auto finish = [&](int64_t begin) {
    if (hard) {
      const float* s = load_s(begin);
      for (int j = 0; j < kTile; j += kLanes) {
        const Vec q = exp((load(s + j) - max_s) * temperature - lse_h);
        store(gradient + j, load(gradient + j) + hard_scale * q);
      }
      if (label / kTile == begin / kTile) gradient[label % kTile] -= hard_scale;
    }
    store_tile(dstudent, a.dtype, begin, width(begin), gradient, past_caches);
  };

  // Backwards: what was touched last is still in the nearest cache.
  const int64_t last = (a.vocab - 1) / kTile * kTile;
  if constexpr (from_state<D>) {
    const float value = D == Divergence::forward_kl ? forward_kl(state, log_s, log_t)
                                                    : reverse_kl(state, log_s, log_t);
    a.per_token[i] = value < 0 ? 0 : value;  // rounding only: a KL is not negative
    if (!dstudent) return;
    for (int64_t begin = last; begin >= 0; begin -= kTile) {
      const float *exp_s = scratch.exp_s + begin, *exp_t = scratch.exp_t + begin;
      const float to_q = scratch.tile_s[begin / kTile], to_p = scratch.tile_t[begin / kTile];
      if constexpr (D == Divergence::forward_kl) {
        // Linear in (p, q): the row's factor goes into the tile's.
        const float weighted_q = to_q * scale, weighted_p = to_p * scale;
        for (int j = 0; j < kTile; j += kLanes) {
          const Vec q = load(exp_s + j) * weighted_q, p = load(exp_t + j) * weighted_p;
          store(gradient + j, gradient_from_state<D>(Vec{}, Vec{}, p, q, Vec{}));
        }
      } else {
        const float *s = load_s(begin), *t = load_t(begin);
        for (int j = 0; j < kTile; j += kLanes) {
          const Vec q = load(exp_s + j) * to_q;
          const Vec lq = load(s + j) - max_s - lse_s, lp = load(t + j) - max_t - lse_t;
          store(gradient + j, gradient_from_state<D>(lp, lq, Vec{}, q, splat(value)) * scale);
        }
      }
      finish(begin);
    }
  } else {
    double value = 0, sum_qg = 0;
    for (int64_t begin = last; begin >= 0; begin -= kTile) {
      float *exp_s = scratch.exp_s + begin, *exp_t = scratch.exp_t + begin;
      const float to_q = scratch.tile_s[begin / kTile], to_p = scratch.tile_t[begin / kTile];
      const float *s = load_s(begin), *t = load_t(begin);
      Vec tile_value{}, tile_qg{};
      for (int j = 0; j < kTile; j += kLanes) {
        const Vec q = load(exp_s + j) * to_q, p = load(exp_t + j) * to_p;
        const Vec lq = load(s + j) - max_s - lse_s, lp = load(t + j) - max_t - lse_t;
        const Term<Vec> one = term<D>(lp, lq, p, q, a.mix, Log{});
        tile_value += one.value;
        tile_qg += one.qg;
        store(exp_s + j, q);  // in place of the exponentials: q and qg
        store(exp_t + j, one.qg);
      }
      value += sum(tile_value);
      sum_qg += sum(tile_qg);
    }
    a.per_token[i] = value < 0 ? 0 : value;
    if (!dstudent) return;
    const float total = sum_qg;
    for (int64_t begin = 0; begin < a.vocab; begin += kTile) {
      for (int j = 0; j < kTile; j += kLanes) {
        const Vec q = load(scratch.exp_s + begin + j), qg = load(scratch.exp_t + begin + j);
        store(gradient + j, (qg - q * total) * scale);
      }
      finish(begin);
    }
  }
}

void zero_entries(const SpanKlArgs& a, int64_t i, int64_t from) {
  if (!a.dstudent.data) return;
  char* row = row_pointer(a, a.dstudent, i);
  memset(row + from * size_of(a.dtype), 0, (a.student_vocab - from) * size_of(a.dtype));
}

template <Divergence D>
bool all_rows(const SpanKlArgs& a, int threads) {
  int64_t rows = 1, supervised = 0;
  for (int d = 0; d < a.leading; ++d) rows *= a.sizes[d];
  for (int64_t i = 0; i < rows; ++i) supervised += a.supervised[i] != 0;
  // A gradient that no cache could hold until it is used goes straight to memory.
  const bool past_caches = a.dstudent.data != a.student.data &&
                           supervised * a.vocab * size_of(a.dtype) > (int64_t{8} << 20);
  bool complete = true;
#pragma omp parallel num_threads(threads) reduction(&& : complete)
  {
    const Scratch scratch((a.vocab + kTile - 1) / kTile);
    complete = scratch.exp_s != nullptr;
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < rows; ++i) {
      if (!complete) continue;
      if (a.supervised[i]) {
        one_row<D>(a, i, scratch, past_caches);
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

}  // namespace

#define SADKERN_JOIN_(a, b) a##b
#define SADKERN_JOIN(a, b) SADKERN_JOIN_(a, b)

bool SADKERN_JOIN(span_kl_, SADKERN_ISA)(const SpanKlArgs& a, int threads) {
  switch (a.divergence) {
    case Divergence::forward_kl: return all_rows<Divergence::forward_kl>(a, threads);
    case Divergence::reverse_kl: return all_rows<Divergence::reverse_kl>(a, threads);
    case Divergence::jsd: return all_rows<Divergence::jsd>(a, threads);
    case Divergence::skew_forward_kl: return all_rows<Divergence::skew_forward_kl>(a, threads);
    case Divergence::skew_reverse_kl: return all_rows<Divergence::skew_reverse_kl>(a, threads);
    case Divergence::tvd: return all_rows<Divergence::tvd>(a, threads);
  }
  return false;
}

}  // namespace sadkern
