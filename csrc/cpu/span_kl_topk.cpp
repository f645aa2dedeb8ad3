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
  SADKERN_INLINE static double log(double x) { return __builtin_log(x); }
  SADKERN_INLINE static double abs(double x) { return __builtin_fabs(x); }
};

// One of the teacher's tokens, with both sides' probabilities and its share of sum q g.
struct Bucket {
  int64_t id;
  float logit;  // the student's
  double lp, p, lq, q, qg;
};

// sum e^x over parts given by their maximum and their sum relative to it.
struct ExpSum {
  double max = -kInf, sum = 0;

  SADKERN_INLINE void add(double part_max, double part_sum) {
    if (part_max > max) {
      sum *= __builtin_exp(max - part_max);
      max = part_max;
    }
    // Of a part at -inf nothing but a NaN counts.
    if (part_max != -kInf || part_sum != part_sum) {
      sum += part_sum * (part_max == max ? 1 : __builtin_exp(part_max - max));
    }
  }
  double log() const { return max + __builtin_log(sum); }
};

// Of one thread: the row by whole tiles, each tile's maximum and factor, and the buckets, which are kept
// by tile: those of tile k are [first[k], first[k + 1]).
struct Scratch {
  float *exp_s, *tile_max, *to_gradient;
  int64_t* first;
  Bucket* buckets;

  Scratch(int64_t tiles, int64_t k) {
    const int64_t floats = tiles * kTile + (tiles * 2 + 15) / 16 * 16, firsts = (tiles + 8) / 8 * 8;
    const int64_t bytes = 4 * floats + 8 * firsts + k * int64_t{sizeof(Bucket)};
    exp_s = static_cast<float*>(aligned_alloc(64, (bytes + 63) / 64 * 64));
    tile_max = exp_s + tiles * kTile;
    to_gradient = tile_max + tiles;
    first = reinterpret_cast<int64_t*>(exp_s + floats);
    buckets = reinterpret_cast<Bucket*>(first + firsts);
  }
  ~Scratch() { free(exp_s); }
};

template <class E>
class Row : StudentRow<E> {
  using Base = StudentRow<E>;
  using Base::student_, Base::scale_, Base::inv_temperature_, Base::width;

 public:
  Row(const SpanKlTopkArgs& a, bool past_caches)
      : Base(a, past_caches), a_(a), tiles_((a.vocab + kTile - 1) / kTile), scratch_(tiles_, a.k) {}
  bool has_memory() const { return scratch_.exp_s; }

  void read(int64_t i) {
    Base::open(i);
    sort_buckets(i);
    const double mass = read_teacher(i);
    sweep_tail(i);
    const double lq_tail = normalise_student(i);

    const bool sums_tail = a_.tail_mode != Tail::none;
    // A student without a tail cannot be infinitely far from a teacher's that is only rounding.
    const bool rounding = lq_tail == -kInf && (count_ == a_.vocab || mass <= a_.k * kEps);
    const double p_tail = a_.tail_mode == Tail::bucket && !rounding ? mass : 0, q_tail = exp(lq_tail);
    BucketTerm<double> of_tail{};
    if (sums_tail) of_tail = term(__builtin_log(p_tail), p_tail, lq_tail, q_tail);
    double value = of_tail.value, total = of_tail.qg;
    for (Bucket& bucket : *this) {
      const BucketTerm<double> one = term(bucket.lp, bucket.p, bucket.lq, bucket.q);
      bucket.qg = one.qg;
      value += one.value;
      total += one.qg;
    }
    a_.per_token[i] = sums_tail && value < 0 ? 0 : value;  // rounding only
    total_ = total;
    // The tail's gradient goes to its tokens as its probability does; without any there is none.
    const double to_tail = of_tail.qg - q_tail * total;
    const double log_tail = tail_.log();
    for (int64_t k = 0; k < tiles_; ++k) {
      const double from = scratch_.tile_max[k];
      scratch_.to_gradient[k] = (from == -kInf ? 0 : exp(from - log_tail)) * to_tail * scale_;
    }
  }
  void skip(int64_t i) const {
    a_.per_token[i] = a_.cross_entropy[i] = a_.teacher_entropy[i] = a_.tail_mass[i] = 0;
    a_.agreement[i] = 0;
  }

  void write() const {
    for (int64_t k = tiles_ - 1; k >= 0; --k) {
      const float* exp_s = scratch_.exp_s + k * kTile;
      const float factor = scratch_.to_gradient[k];
      Base::finish(k * kTile, [=](int j) { return load(exp_s + j) * factor; });
    }
    if (Base::past_caches_) stream_fence();  // before entries of the same lines are written again
    for (const Bucket& bucket : *this) {
      Base::finish_one(bucket.id, bucket.logit, (bucket.qg - bucket.q * total_) * scale_);
    }
  }

  Bucket* begin() const { return scratch_.buckets; }
  Bucket* end() const { return scratch_.buckets + count_; }

 private:
  SADKERN_INLINE static double exp(double x) { return __builtin_exp(x); }
  SADKERN_INLINE BucketTerm<double> term(double lp, double p, double lq, double q) const {
    return bucket_term<double, DoubleMath>(a_.divergence, lp, p, lq, q, a_.mix);
  }

  // By counting, in the order of tiles; entries without id are left out.
  SADKERN_INLINE void sort_buckets(int64_t i) {
    const int32_t* ids = a_.ids + i * a_.k;
    const float* logprobs = a_.logprobs + i * a_.k;
    int64_t* const first = scratch_.first;
    for (int64_t k = 0; k <= tiles_; ++k) first[k] = 0;
    for (int64_t b = 0; b < a_.k; ++b) {
      if (ids[b] >= 0) ++first[ids[b] / kTile];
    }
    count_ = 0;
    for (int64_t k = 0; k <= tiles_; ++k) first[k] = count_ += first[k];
    // Filled from the back, every end becomes a beginning.
    for (int64_t b = a_.k - 1; b >= 0; --b) {
      if (ids[b] < 0) continue;
      Bucket& bucket = scratch_.buckets[--first[ids[b] / kTile]];
      bucket.id = ids[b];
      bucket.lp = logprobs[b];
    }
  }

  // Leaves the buckets' probabilities as the tail's mode has them; the mass of the tail.
  SADKERN_INLINE double read_teacher(int64_t i) const {
    double known = 0, entropy = 0;
    for (Bucket& bucket : *this) {
      bucket.p = exp(bucket.lp);
      known += bucket.p;
      entropy -= times_unless_zero(bucket.p, bucket.lp);
    }
    const double missing = known > 1 ? 0 : 1 - known;
    const double mass = a_.tail ? a_.tail[i] : missing;
    if (a_.tail_mode == Tail::renormalize) {
      const double log_known = __builtin_log(known);
      for (Bucket& bucket : *this) {
        bucket.lp -= log_known;
        bucket.p /= known;
      }
      entropy = entropy / known + log_known;
    } else if (a_.tail_mode == Tail::bucket) {
      entropy -= times_unless_zero(mass, __builtin_log(mass));
    }
    a_.teacher_entropy[i] = a_.entropy ? a_.entropy[i] : entropy;
    a_.tail_mass[i] = mass;
    return mass;
  }

  // Leaves the exponentials of the tail relative to their tile's maximum.
  SADKERN_INLINE void sweep_tail(int64_t i) {
    tail_ = tail_h_ = {};
    top_ = -kInf;
    for (int64_t k = 0; k < tiles_; ++k) {
      const int64_t begin = k * kTile;
      const int n = width(begin);
      float* entries = scratch_.exp_s + begin;
      const auto* from = student_[begin];
      for (int j = 0; j < n; j += kLanes) store(entries + j, E::load(from + j));
      take_out(k, i);
      const Vec best = fold(n, splat(-kInf), [=](int j) { return load(entries + j); },
                            [](Vec a, Vec b) { return sadkern::max(a, b); });
      const float top = max(best);
      top_ = top > top_ ? top : top_;
      const float max_s = top * inv_temperature_;
      scratch_.tile_max[k] = max_s;
      const Vec centre = splat(finite(max_s));
      const auto* next = student_[k + 1 < tiles_ ? begin + kTile : 0];
      Sum<false> sum, sum_h;
      for (int j = 0; j < n; j += kLanes) {
        __builtin_prefetch(next + j, 0, 3);
        const Vec x = multiply_subtract(load(entries + j), inv_temperature_, centre);
        const Vec e = sadkern::exp<E::kExpDegree>(x);
        if (Base::softens()) sum_h.add(sadkern::exp(x * a_.temperature));
        store(entries + j, e);
        sum.add(e);
        if ((j + kLanes) % kRun == 0) sum.end_run(), sum_h.end_run();
      }
      tail_.add(max_s, sum.value());
      if (Base::softens()) tail_h_.add(top, sum_h.value());
    }
  }

  // Takes a tile's buckets out of its copy.
  SADKERN_INLINE void take_out(int64_t k, int64_t i) const {
    for (int64_t b = scratch_.first[k]; b < scratch_.first[k + 1]; ++b) {
      float& entry = scratch_.exp_s[scratch_.buckets[b].id];
      if (entry == kInf) __atomic_store_n(a_.repeated, i, __ATOMIC_RELAXED);  // here before
      scratch_.buckets[b].logit = entry;
      entry = kInf;
    }
    for (int64_t b = scratch_.first[k]; b < scratch_.first[k + 1]; ++b) {
      scratch_.exp_s[scratch_.buckets[b].id] = -kInf;
    }
  }

  // Leaves the buckets' probabilities; the logarithm of the tail's.
  SADKERN_INLINE double normalise_student(int64_t i) {
    float top = top_;
    double best_lp = -kInf;
    for (const Bucket& bucket : *this) {
      top = bucket.logit > top ? bucket.logit : top;
      best_lp = bucket.lp > best_lp ? bucket.lp : best_lp;
    }
    const double inv_temperature = inv_temperature_, max_s = finite(top * inv_temperature_);
    double sum = tail_.sum * (tail_.max == -kInf ? 1 : exp(tail_.max - max_s));
    double sum_h = tail_h_.sum * (tail_h_.max == -kInf ? 1 : exp(tail_h_.max - top));
    for (Bucket& bucket : *this) {
      bucket.lq = bucket.logit * inv_temperature - max_s;
      bucket.q = exp(bucket.lq);
      sum += bucket.q;
      if (Base::softens()) sum_h += exp(double{bucket.logit} - top);
    }
    const double log_sum = __builtin_log(sum);
    bool agree = false;
    for (Bucket& bucket : *this) {
      bucket.lq -= log_sum;
      bucket.q /= sum;
      agree |= bucket.lp == best_lp && bucket.logit == top;
    }
    const double log_h = Base::softens() ? __builtin_log(sum_h) : log_sum;
    Base::normalise(max_s, log_h);
    a_.cross_entropy[i] = Base::cross_entropy(log_h);
    a_.agreement[i] = agree;
    return tail_.log() - max_s - log_sum;
  }

  const SpanKlTopkArgs& a_;
  const int64_t tiles_;
  const Scratch scratch_;
  int64_t count_ = 0;     // buckets
  ExpSum tail_, tail_h_;  // the latter at temperature 1
  float top_ = 0;
  double total_ = 0;      // sum q g
};

}  // namespace

bool SADKERN_OF_ISA(span_kl_topk)(const SpanKlTopkArgs& a, int threads) {
  return with_element(a.dtype, [&](auto e) { return all_rows<Row<decltype(e)>>(a, threads); });
}

}  // namespace sadkern
