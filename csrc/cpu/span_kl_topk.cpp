// span_kl over logits x top-k: loss, diagnostics and gradient of one row per step.
//
// The teacher's K tokens are buckets of their own and all others are one, the tail. A divergence of such
// coarsened distributions has few terms; what is wide is the student's tail, whose sum no subtraction may
// give: the row is copied into the cache, its K entries are taken out, and what is left is the tail's own
// softmax. Its gradient is one factor, and the K entries are written after it.
//
// Compiled once per instruction set, with SADKERN_ISA naming the entry point.

#include "span_kl_topk.h"

#include <stdlib.h>

#include "row.h"
#include "tile_state.h"

namespace sadkern {
namespace {

constexpr double kEps = 0x1p-23;  // of fp32, as which the teacher's log-probabilities come

struct DoubleMath {
  SADKERN_INLINE static double exp(double x) { return __builtin_exp(x); }
  SADKERN_INLINE static double log(double x) { return __builtin_log(x); }
  SADKERN_INLINE static double abs(double x) { return __builtin_fabs(x); }
};

// One of the teacher's tokens: log-probabilities of both sides, and the share in sum q g.
struct Bucket {
  int64_t id;   // negative: no entry
  float logit;  // the student's
  double lp, lq, qg;
};

// log of the sum of e^x over the parts added.
class LogSum {
 public:
  // sum * e^max
  SADKERN_INLINE void add(double max, double sum = 1) {
    if (max > max_) {
      sum_ *= __builtin_exp(max_ - max);
      max_ = max;
    }
    // Of a part at -inf nothing but a NaN counts.
    if (max != -kInf || sum != sum) sum_ += sum * (max == max_ ? 1 : __builtin_exp(max - max_));
  }
  double value() const { return max_ + __builtin_log(sum_); }

 private:
  double max_ = -kInf, sum_ = 0;
};

// Of one thread: the row by whole tiles, each tile's maximum and factor, the buckets.
struct Scratch {
  float *exp_s, *tile_max, *to_gradient;
  Bucket* buckets;

  Scratch(int64_t tiles, int64_t k) {
    const int64_t floats = 4 * (tiles * kTile + 2 * tiles);
    const int64_t bytes = (floats + 63) / 64 * 64 + k * int64_t{sizeof(Bucket)};
    exp_s = static_cast<float*>(aligned_alloc(64, (bytes + 63) / 64 * 64));
    tile_max = exp_s + tiles * kTile;
    to_gradient = tile_max + tiles;
    buckets = reinterpret_cast<Bucket*>(reinterpret_cast<char*>(exp_s) + (floats + 63) / 64 * 64);
  }
  ~Scratch() { free(exp_s); }
};

template <class E>
class Row : StudentRow<E> {
  using Base = StudentRow<E>;
  using Base::student_, Base::scale_, Base::inv_temperature_, Base::width;

 public:
  Row(const SpanKlTopkArgs& a, bool past_caches)
      : Base(a, past_caches), a_(a), scratch_((a.vocab + kTile - 1) / kTile, a.k) {}
  bool has_memory() const { return scratch_.exp_s; }

  void read(int64_t i) {
    Base::open(i);
    copy_row();
    take_out_buckets(i);
    const double mass = normalise_teacher(i);
    const LogSum tail = sweep_tail();
    normalise_student(i, tail);

    const bool sums_tail = a_.tail_mode != Tail::none;
    const double lq_tail = tail.value() - lse_;
    // A student without a tail cannot be infinitely far from a teacher's that is only rounding.
    const bool rounding = lq_tail == -kInf && (entries_ == a_.vocab || mass <= a_.k * kEps);
    const double lp_tail = a_.tail_mode == Tail::bucket && !rounding ? __builtin_log(mass) : -kInf;
    BucketTerm<double> of_tail{};
    if (sums_tail) of_tail = term(lp_tail, lq_tail);
    double value = of_tail.value, total = of_tail.qg;
    for (int64_t b = 0; b < a_.k; ++b) {
      Bucket& bucket = scratch_.buckets[b];
      if (bucket.id < 0) continue;
      const BucketTerm<double> one = term(bucket.lp, bucket.lq);
      bucket.qg = one.qg;
      value += one.value;
      total += one.qg;
    }
    a_.per_token[i] = sums_tail && value < 0 ? 0 : value;  // rounding only
    total_ = total;
    // A tail without any probability has no tokens to be moved.
    const double to_tail = of_tail.qg - __builtin_exp(lq_tail) * total;
    for (int64_t begin = 0; begin < a_.vocab; begin += kTile) {
      const float from = scratch_.tile_max[begin / kTile];
      const double max_s = from * inv_temperature_;
      const double share = from == -kInf ? 0 : __builtin_exp(max_s - tail.value());
      scratch_.to_gradient[begin / kTile] = share * to_tail * scale_;
    }
  }
  void skip(int64_t i) const {
    a_.per_token[i] = a_.cross_entropy[i] = a_.teacher_entropy[i] = a_.tail_mass[i] = 0;
    a_.agreement[i] = 0;
  }

  void write() const {
    for (int64_t begin = (a_.vocab - 1) / kTile * kTile; begin >= 0; begin -= kTile) {
      const float* exp_s = scratch_.exp_s + begin;
      const float factor = scratch_.to_gradient[begin / kTile];
      Base::finish(begin, [=](int j) { return load(exp_s + j) * factor; });
    }
    if (Base::past_caches_) stream_fence();  // before entries of the same lines are written again
    for (int64_t b = 0; b < a_.k; ++b) {
      const Bucket& bucket = scratch_.buckets[b];
      if (bucket.id < 0) continue;
      const double entry = bucket.qg - __builtin_exp(bucket.lq) * total_;
      Base::finish_one(bucket.id, bucket.logit, entry * scale_);
    }
  }

 private:
  SADKERN_INLINE BucketTerm<double> term(double lp, double lq) const {
    return bucket_term<double, DoubleMath>(a_.divergence, lp, lq, a_.mix);
  }
  SADKERN_INLINE double inv_temperature() const { return inv_temperature_; }

  SADKERN_INLINE void copy_row() const {
    for (int64_t begin = 0; begin < a_.vocab; begin += kTile) {
      const auto* from = student_[begin];
      for (int j = 0; j < width(begin); j += kLanes) {
        store(scratch_.exp_s + begin + j, E::load(from + j));
      }
    }
  }

  void take_out_buckets(int64_t i) {
    entries_ = 0;
    for (int64_t b = 0; b < a_.k; ++b) {
      const int64_t id = a_.ids[i * a_.k + b];
      float& entry = scratch_.exp_s[id < 0 ? 0 : id];
      scratch_.buckets[b] = {id, id < 0 ? -kInf : entry, a_.logprobs[i * a_.k + b], 0, 0};
      if (id < 0) continue;
      if (entry == kInf) __atomic_store_n(a_.repeated, i, __ATOMIC_RELAXED);  // taken out before
      entry = kInf;
      ++entries_;
    }
    for (int64_t b = 0; b < a_.k; ++b) {
      if (scratch_.buckets[b].id >= 0) scratch_.exp_s[scratch_.buckets[b].id] = -kInf;
    }
  }

  // Leaves the buckets' log-probabilities as the tail's mode has them; the mass of the tail.
  SADKERN_INLINE double normalise_teacher(int64_t i) const {
    LogSum given;
    double entropy = 0;
    for (int64_t b = 0; b < a_.k; ++b) {
      const Bucket& bucket = scratch_.buckets[b];
      if (bucket.id < 0) continue;
      given.add(bucket.lp);
      entropy -= times_unless_zero(__builtin_exp(bucket.lp), bucket.lp);
    }
    const double known = __builtin_exp(given.value());
    const double missing = known > 1 ? 0 : 1 - known;
    const double mass = a_.tail ? a_.tail[i] : missing;
    if (a_.tail_mode == Tail::renormalize) {
      for (int64_t b = 0; b < a_.k; ++b) scratch_.buckets[b].lp -= given.value();
      entropy = entropy / known + given.value();
    } else if (a_.tail_mode == Tail::bucket) {
      entropy -= times_unless_zero(mass, __builtin_log(mass));
    }
    a_.teacher_entropy[i] = a_.entropy ? a_.entropy[i] : entropy;
    a_.tail_mass[i] = mass;
    return mass;
  }

  // Leaves the exponentials of the tail relative to their tile's maximum.
  SADKERN_INLINE LogSum sweep_tail() {
    LogSum sum, sum_h;
    top_tail_ = -kInf;
    for (int64_t begin = 0; begin < a_.vocab; begin += kTile) {
      float* entries = scratch_.exp_s + begin;
      Vec best = splat(-kInf);
      for (int j = 0; j < width(begin); j += kLanes) best = max(load(entries + j), best);
      const float top = max(best);
      scratch_.tile_max[begin / kTile] = top;
      top_tail_ = top > top_tail_ ? top : top_tail_;
      const Vec centre = splat(finite(top * inv_temperature_));
      Sum<false> tile, tile_h;
      for (int j = 0; j < width(begin); j += kLanes) {
        const Vec x = multiply_subtract(load(entries + j), inv_temperature_, centre);
        const Vec e = exp<E::kExpDegree>(x);
        if (Base::softens()) tile_h.add(exp(x * a_.temperature));
        store(entries + j, e);
        tile.add(e);
        if ((j + kLanes) % kRun == 0) tile.end_run(), tile_h.end_run();
      }
      sum.add(top * inv_temperature_, tile.value());
      sum_h.add(top, tile_h.value());
    }
    tail_h_ = sum_h;
    return sum;
  }

  SADKERN_INLINE void normalise_student(int64_t i, LogSum all) {
    LogSum all_h = tail_h_;
    float top = top_tail_;
    double best_lp = -kInf;
    for (int64_t b = 0; b < a_.k; ++b) {
      const Bucket& bucket = scratch_.buckets[b];
      if (bucket.id < 0) continue;
      all.add(bucket.logit * inv_temperature());
      if (Base::softens()) all_h.add(bucket.logit);
      top = bucket.logit > top ? bucket.logit : top;
      best_lp = bucket.lp > best_lp ? bucket.lp : best_lp;
    }
    lse_ = all.value();
    bool agree = false;
    for (int64_t b = 0; b < a_.k; ++b) {
      Bucket& bucket = scratch_.buckets[b];
      if (bucket.id < 0) continue;
      bucket.lq = bucket.logit * inv_temperature() - lse_;
      agree |= bucket.lp == best_lp && bucket.logit == top;
    }
    const double max_s = top * inv_temperature_;
    const double log_h = Base::softens() ? all_h.value() - top : lse_ - max_s;
    Base::normalise(max_s, log_h);
    a_.cross_entropy[i] = Base::cross_entropy(log_h);
    a_.agreement[i] = agree;
  }

  const SpanKlTopkArgs& a_;
  const Scratch scratch_;
  LogSum tail_h_;  // at temperature 1
  float top_tail_ = 0;
  int64_t entries_ = 0;
  double lse_ = 0, total_ = 0;
};

}  // namespace

bool SADKERN_OF_ISA(span_kl_topk)(const SpanKlTopkArgs& a, int threads) {
  switch (a.dtype) {
    case DType::float32: return all_rows<Row<Float32>>(a, threads);
    case DType::bfloat16: return all_rows<Row<BFloat16>>(a, threads);
    case DType::float16: return all_rows<Row<Float16>>(a, threads);
  }
  return false;
}

}  // namespace sadkern
