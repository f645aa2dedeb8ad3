// Top-k, log-normaliser, entropy and tail mass of one row of logits per step.
//
// One sweep takes the exponentials, which stay in the cache, and collects what is above the k-th largest
// logit so far; when many are collected the best k of them raise that bar. The tail's mass is the sum of
// the exponentials that are left when those of the top k are taken out.
//
// Compiled once per instruction set, with SADKERN_ISA naming the entry point.

#include "topk.h"

#include <stdlib.h>

#include "row.h"
#include "tile_state.h"

namespace sadkern {
namespace {

// Candidates are integers that sort as they do: larger logits first, and of equal ones the smaller id.
constexpr int kIdBits = 32;

// A float's bits as an integer of the same order.
SADKERN_INLINE uint32_t ordered(float x) {
  uint32_t u;
  memcpy(&u, &x, sizeof u);
  return u & 0x80000000u ? ~u : u | 0x80000000u;
}
SADKERN_INLINE uint64_t key_of(float logit, int64_t id) {
  return uint64_t{ordered(logit + 0.0f)} << kIdBits | (0xffffffffu - static_cast<uint32_t>(id));
}
SADKERN_INLINE int64_t id_of(uint64_t key) { return 0xffffffffu - static_cast<uint32_t>(key); }
SADKERN_INLINE float logit_of(uint64_t key) {
  const uint32_t u = static_cast<uint32_t>(key >> kIdBits);
  const uint32_t as_float = u & 0x80000000u ? u & 0x7fffffffu : ~u;
  float x;
  memcpy(&x, &as_float, sizeof x);
  return x;
}

// The k largest logits seen so far, and some more.
class Candidates {
 public:
  // `keys` has room for a vector more than `capacity`.
  Candidates(uint64_t* keys, const TopkArgs& a, int64_t capacity)
      : keys_(keys), k_(a.k), vocab_(a.vocab), capacity_(capacity) {}

  // `first`: the row's first tile if it is whole, else nullptr.
  template <class E>
  void start(const typename E::Raw* first) {
    count_ = 0;
    bar_ = splat(__builtin_nanf(""));  // nothing is below it
    if (!first) return;
    // Of k parts of the tile each has an entry as large as the smallest of their maxima.
    const int groups = static_cast<int>((k_ + kLanes - 1) / kLanes), length = kTile / kLanes / groups;
    Vec least = splat(kInf);
    for (int group = 0; group < groups; ++group) {
      Vec most = splat(-kInf);
      for (int i = group * length; i < (group + 1) * length; ++i) {
        most = max(E::load(first + i * kLanes), most);
      }
      least = -max(-least, -most);
    }
    const float bar = -max(-least);
    // Only what is above the bar is taken, and here what is equal belongs to it.
    if (bar > -kInf) bar_ = splat(bar - __builtin_fabsf(bar) * 0x1p-22f - 0x1p-126f);
  }
  SADKERN_INLINE void add(Vec logits, int64_t begin) {
    // Strictly above: of equal logits the first came first.
    const VecI above = ~(logits <= bar_);
    if (__builtin_expect(any(above), 0)) collect(logits, lane_mask(above), begin);
  }
  // Largest first.
  const uint64_t* finish() {
    largest_first(keys_, count_, k_, true);
    return keys_;
  }

 private:
  void __attribute__((noinline)) collect(Vec logits, uint32_t lanes, int64_t begin) {
    alignas(64) float entries[kLanes];
    store(entries, logits);
    for (; lanes != 0; lanes &= lanes - 1) {
      const int lane = __builtin_ctz(lanes);
      if (begin + lane < vocab_) keys_[count_++] = key_of(entries[lane], begin + lane);
    }
    if (count_ < capacity_) return;
    largest_first(keys_, count_, k_, false);
    count_ = k_;
    uint64_t least = keys_[0];
    for (int64_t i = 1; i < k_; ++i) least = keys_[i] < least ? keys_[i] : least;
    bar_ = splat(logit_of(least));
  }

  uint64_t* const keys_;
  const int64_t k_, vocab_, capacity_;
  int64_t count_ = 0;
  Vec bar_{};
};

// Of one thread: exponentials by whole tiles, each tile's maximum, candidates.
struct Scratch {
  float *exps, *tile_max;
  uint64_t* keys;
  int64_t capacity;  // of keys; there is room for a vector more

  Scratch(int64_t tiles, int64_t k) : capacity(k < 128 ? 256 : 2 * k) {
    const int64_t floats = (4 * (tiles * kTile + tiles) + 63) / 64 * 64;
    const int64_t bytes = floats + 8 * (capacity + kLanes);
    exps = static_cast<float*>(aligned_alloc(64, (bytes + 63) / 64 * 64));
    tile_max = exps + tiles * kTile;
    keys = reinterpret_cast<uint64_t*>(reinterpret_cast<char*>(exps) + floats);
  }
  ~Scratch() { free(exps); }
};

template <class E>
class Row {
 public:
  explicit Row(const TopkArgs& a)
      : a_(a), inv_temperature_(1 / a.temperature), scratch_((a.vocab + kTile - 1) / kTile, a.k),
        candidates_(scratch_.keys, a, scratch_.capacity) {}
  bool has_memory() const { return scratch_.exps; }

  void select(int64_t i) {
    logits_.open(row_pointer(a_, a_.logits, i), a_.vocab);
    candidates_.template start<E>(a_.vocab >= kTile ? logits_[0] : nullptr);
    State state = State::empty(-kInf);
    for (int64_t begin = 0; begin < a_.vocab; begin += kTile) {
      state = merge(state, sweep(begin), double{a_.temperature}, Exp{});
    }
    const double log_sum = __builtin_log(state.sum_t);
    const double lse = state.max_t + log_sum;
    a_.lse[i] = lse;
    a_.entropy[i] = teacher_entropy(state, log_sum);
    const uint64_t* best = candidates_.finish();
    for (int64_t b = 0; b < a_.k; ++b) {
      const int64_t id = id_of(best[b]);
      a_.ids[i * a_.k + b] = static_cast<int32_t>(id);
      const double scaled = logit_of(best[b]) * double{inv_temperature_};
      a_.logprobs[i * a_.k + b] = scaled - lse;
      scratch_.exps[id] = 0;
    }
    a_.tail_mass[i] = sum_left(state.max_t) / state.sum_t;
  }

 private:
  // One tile: its state, its exponentials left in scratch, its candidates collected.
  SADKERN_INLINE State sweep(int64_t begin) {
    const auto* logits = logits_[begin];
    const auto* next = logits_[begin + kTile < a_.vocab ? begin + kTile : 0];
    const int n = width(begin);
    const Vec best = fold(n, splat(-kInf), [=](int j) { return E::load(logits + j); },
                          [](Vec a, Vec b) { return max(a, b); });
    State state = State::empty(-kInf);
    state.max_t = max(best) * inv_temperature_;
    scratch_.tile_max[begin / kTile] = state.max_t;
    const Vec centre = splat(finite(state.max_t));
    Sum<false> sum_t, ent_t;
    for (int j = 0; j < n; j += kLanes) {
      __builtin_prefetch(next + j, 0, 3);
      const Vec logit = E::load(logits + j);
      const Vec x = multiply_subtract(logit, inv_temperature_, centre);
      const Vec e = exp<E::kExpDegree>(x);
      store(scratch_.exps + begin + j, e);
      sum_t.add(e);
      ent_t.add(e, max(splat(kExpFloor), x));
      if ((j + kLanes) % kRun == 0) sum_t.end_run(), ent_t.end_run();
      candidates_.add(logit, begin + j);
    }
    state.sum_t = sum_t.value();
    state.ent_t = ent_t.value();
    return state;
  }

  // Of the exponentials that are still there, relative to `max_t`.
  SADKERN_INLINE double sum_left(double max_t) const {
    double left = 0;
    for (int64_t begin = 0; begin < a_.vocab; begin += kTile) {
      const float* exps = scratch_.exps + begin;
      const Vec tile = fold(width(begin), Vec{}, [=](int j) { return load(exps + j); },
                            [](Vec a, Vec b) { return a + b; });
      const double from = scratch_.tile_max[begin / kTile];
      if (from != -kInf) left += sum(tile) * __builtin_exp(from - max_t);
    }
    return left;
  }

  SADKERN_INLINE int width(int64_t begin) const { return tile_width(a_.vocab, begin); }

  const TopkArgs& a_;
  const float inv_temperature_;
  const Scratch scratch_;
  Tiles<E> logits_;
  Candidates candidates_;
};

}  // namespace

bool SADKERN_OF_ISA(topk)(const TopkArgs& a, int threads) {
  return with_element(a.dtype, [&](auto e) {
    const auto make = [&] { return Row<decltype(e)>(a); };
    return each_row(rows_of(a), threads, 1, make, [](auto& row, int64_t i) { row.select(i); });
  });
}

}  // namespace sadkern
