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

#include "element.h"

namespace sadkern {
namespace {

// What stays in the L1 cache between a tile's maxima and its exponentials.
constexpr int kTile = 2048;

struct Math {
  SADKERN_INLINE static Vec log(Vec x) { return sadkern::log(x); }
  SADKERN_INLINE static Vec max(Vec a, Vec b) { return sadkern::max(a, b); }
  SADKERN_INLINE static Vec abs(Vec x) { return from_bits(bits(x) & 0x7fffffff); }
  SADKERN_INLINE static Vec reciprocal(Vec x) { return sadkern::reciprocal(max(splat(1e-37f), x)); }
};
struct Exp {
  SADKERN_INLINE double operator()(double x) const { return __builtin_exp(x); }
};

using State = RowState<double>;

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

SADKERN_INLINE char* row_pointer(const SpanKlArgs& a, const Rows& rows, int64_t i) {
  int64_t offset = 0;
  for (int d = a.leading - 1; d >= 0; --d) {
    offset += i % a.sizes[d] * rows.strides[d];
    i /= a.sizes[d];
  }
  return static_cast<char*>(rows.data) + offset * size_of(a.dtype);
}

// A row's logits by tiles of whole vectors: a ragged end is a copy, filled up with -inf.
template <class E>
class Tiles {
 public:
  Tiles(const void* row, int64_t vocab)
      : row_(static_cast<const Raw*>(row)),
        whole_(vocab % kLanes == 0 ? vocab : vocab / kTile * kTile) {
    const int rest = static_cast<int>(vocab - whole_);
    if (rest == 0) return;
    memcpy(end_, row_ + whole_, rest * sizeof(Raw));
    for (int j = rest; j < rest + kLanes; ++j) end_[j] = E::kNegInf;
  }
  SADKERN_INLINE const typename E::Raw* operator[](int64_t begin) const {
    return begin < whole_ ? row_ + begin : end_;
  }

 private:
  using Raw = typename E::Raw;
  const Raw* row_;
  int64_t whole_;
  alignas(64) Raw end_[kTile + kLanes];
};

// A row's gradient, written by tiles.
template <class E>
class Gradient {
 public:
  Gradient(void* row, bool past_caches) : row_(static_cast<Raw*>(row)), past_caches_(past_caches) {}
  explicit operator bool() const { return row_; }

  // Entries [begin, begin + n), of which `entries(j)` gives the vector at begin + j.
  template <class F>
  SADKERN_INLINE void write(int64_t begin, int n, F entries) const {
    constexpr uintptr_t kVector = kLanes * sizeof(Raw);
    Raw* to = row_ + begin;
    if (n % kLanes != 0) {
      alignas(64) Raw buffer[kTile];
      for (int j = 0; j < n; j += kLanes) E::store(buffer + j, entries(j));
      memcpy(to, buffer, n * sizeof(Raw));
    } else if (past_caches_ && reinterpret_cast<uintptr_t>(to) % kVector == 0) {
      for (int j = 0; j < n; j += kLanes) E::stream(to + j, entries(j));
    } else {
      for (int j = 0; j < n; j += kLanes) E::store(to + j, entries(j));
    }
  }

 private:
  using Raw = typename E::Raw;
  Raw* row_;
  bool past_caches_;
};

struct Maxima {
  float s, t;
};

template <class E>
SADKERN_INLINE Maxima maxima(const typename E::Raw* s, const typename E::Raw* t, int n) {
  Vec best_s = splat(-kInf), best_t = splat(-kInf);
  for (int j = 0; j < n; j += kLanes) {
    best_s = max(E::load(s + j), best_s);
    best_t = max(E::load(t + j), best_t);
  }
  return {max(best_s), max(best_t)};
}

// The state of one tile of n logits, its exponentials left in exp_s and exp_t. The maxima of the next
// tile are found meanwhile: that fetches it, and the comparisons fill slots that the polynomials leave.
template <Divergence D, class E>
SADKERN_INLINE State tile_state(const typename E::Raw* s, const typename E::Raw* t, int n, Maxima top,
                                float inv_temperature, float temperature, bool hard, float* exp_s,
                                float* exp_t, const typename E::Raw* next_s,
                                const typename E::Raw* next_t, int next_n, Maxima& next_top) {
  State state = State::empty(-kInf);
  state.max_s = top.s * inv_temperature;
  state.max_t = top.t * inv_temperature;
  // A tile of banned tokens only: any finite centre makes its exponentials 0.
  const Vec centre_s = splat(top.s == -kInf ? 0 : top.s * inv_temperature);
  const Vec centre_t = splat(top.t == -kInf ? 0 : top.t * inv_temperature);
  Vec sum_s{}, sum_t{}, ent_t{}, cross_t{}, cross_s{};
  Vec best_s = splat(-kInf), best_t = splat(-kInf);
  const int next_last = (next_n - 1) / kLanes * kLanes;
  for (int j = 0; j < n; j += kLanes) {
    const int k = j < next_last ? j : next_last;  // the row's last tile is shorter
    best_s = max(E::load(next_s + k), best_s);
    best_t = max(E::load(next_t + k), best_t);
    __builtin_prefetch(next_s + j + kTile, 0, 2);
    __builtin_prefetch(next_t + j + kTile, 0, 2);
    const Vec x_s = multiply_subtract(E::load(s + j), inv_temperature, centre_s);
    const Vec x_t = multiply_subtract(E::load(t + j), inv_temperature, centre_t);
    const Vec e_s = exp<E::kExpDegree>(x_s), e_t = exp<E::kExpDegree>(x_t);
    store(exp_s + j, e_s);
    store(exp_t + j, e_t);
    sum_s += e_s;
    sum_t += e_t;
    // Bounded, so that an exponential of 0 gives a moment of 0; the other side's may be -inf in earnest.
    ent_t += e_t * max(splat(kExpFloor), x_t);
    if constexpr (D == Divergence::forward_kl) {
      cross_t = x_t < kExpFloor ? cross_t : cross_t + e_t * (x_t - x_s);
    } else if constexpr (D == Divergence::reverse_kl) {
      cross_s = x_s < kExpFloor ? cross_s : cross_s + e_s * (x_s - x_t);
    }
  }
  next_top = {max(best_s), max(best_t)};
  state.sum_s = sum(sum_s);
  state.sum_t = sum(sum_t);
  state.ent_t = sum(ent_t);
  state.cross_t = sum(cross_t);
  state.cross_s = sum(cross_s);
  if (hard) {
    Vec sum_h{};
    for (int j = 0; j < n; j += kLanes) {
      const Vec x_s = multiply_subtract(E::load(s + j), inv_temperature, centre_s);
      sum_h += exp(x_s * temperature);
    }
    state.sum_h = sum(sum_h);
  }
  return state;
}

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

  State state = State::empty(-kInf);
  Maxima top = maxima<E>(student[0], teacher[0], width(0));
  for (int64_t begin = 0; begin < a.vocab; begin += kTile) {
    const int64_t next = begin + kTile < a.vocab ? begin + kTile : begin;
    const State tile = tile_state<D, E>(
        student[begin], teacher[begin], width(begin), top, inv_temperature, temperature,
        hard && temperature != 1, scratch.exp_s + begin, scratch.exp_t + begin, student[next],
        teacher[next], width(next), top);
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
        // Gaps as the first sweep took them, from the tile's own maxima: a token that has nearly all of
        // q is then its mean gap to the last bit.
        const auto *s = student[begin], *t = teacher[begin];
        const float top_s = scratch.tile_s[begin / kTile], top_t = scratch.tile_t[begin / kTile];
        const Vec tile_max_s = splat(top_s), tile_max_t = splat(top_t);
        const double shift = (state.max_s - top_s) - (state.max_t - top_t);
        const Vec centre = splat(mean_gap(state) + shift);
        finish(begin, [=](int j) {
          const Vec q = load(exp_s + j) * to_q;
          return reverse_kl_gradient(q, below(s + j, tile_max_s) - below(t + j, tile_max_t) - centre) * scale;
        });
      }
    }
  } else {
    // log q - log p is s - t less a number of the row. Where s and t are close, their difference is
    // exact; where all of s is far from t, that distance goes first.
    const float apart = (state.max_s - state.max_t) * temperature;
    const float offset = -1 < apart && apart < 1 ? 0 : apart;
    const Vec centre =
        splat(state.max_s - state.max_t - double{offset} * inv_temperature + log_s - log_t);
    double value = 0, mean_g = 0;
    for (int64_t begin = last; begin >= 0; begin -= kTile) {
      float *exp_s = scratch.exp_s + begin, *exp_t = scratch.exp_t + begin;
      const float to_q = scratch.to_q[begin / kTile], to_p = scratch.to_p[begin / kTile];
      const auto *s = student[begin], *t = teacher[begin];
      Vec tile_value{}, tile_g{};
      for (int j = 0; j < width(begin); j += kLanes) {
        // Each rounded by itself: equal logits must give p == q.
        const Vec q = rounded(load(exp_s + j) * to_q), p = rounded(load(exp_t + j) * to_p);
        const Vec gap = (E::load(s + j) - offset) - E::load(t + j);
        const Vec log_ratio = multiply_subtract(gap, inv_temperature, centre);
        const Term<Vec> one = term<D, Math>(p, q, log_ratio, a.mix);
        tile_value += one.value;
        tile_g += q * one.g;
        store(exp_s + j, q);  // in place of the exponentials: q and g
        store(exp_t + j, one.g);
      }
      value += sum(tile_value);
      mean_g += sum(tile_g);
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
