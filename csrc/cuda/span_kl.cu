// span_kl over logits x logits, each row read once: loss, diagnostics and gradient.
//
// A cluster of blocks takes a row at a time, one block where the row fits it. The student's entries stay
// packed in registers, the teacher's in shared memory, until the gradient is written; as each vector of it
// is, the next row's takes its place, so that loading overlaps with what is left of this one.

#include "span_kl.h"

#include "launch.h"
#include "row.cuh"

namespace sadkern {
namespace {

constexpr int kThreads = 1024, kVectors = 4;  // of a block at most; of a thread
static_assert(kThreads * kVectors * kEntries == kLongestPart);
constexpr int kOfThread = kVectors * sizeof(uint4);  // of shared memory: the teacher's entries
static_assert(Together::kBytes + kThreads * kOfThread == kSpanKlShared);

struct Math {
  // csrc/cpu/simd.h says how: all digits near 1, and a finite number at 0.
  __device__ __forceinline__ static float log(float x) {
    const uint32_t bits = __float_as_uint(x);
    const int n = static_cast<int>(bits - 0x3f3504f3u) >> 23;
    const float f = __uint_as_float(bits - (static_cast<uint32_t>(n) << 23)) - 1.0f;
    float poly = fmaf(f, 8.734845370e-2f, -1.430752277e-1f);
    poly = fmaf(poly, f, 1.491797268e-1f);
    poly = fmaf(poly, f, -1.657050848e-1f);
    poly = fmaf(poly, f, 1.996207237e-1f);
    poly = fmaf(poly, f, -2.500175536e-1f);
    poly = fmaf(poly, f, 3.333395123e-1f);
    poly = fmaf(poly, f, -4.999999106e-1f);
    return fmaf(static_cast<float>(n), 0.693147181f, fmaf(f * f, poly, f));
  }
  __device__ __forceinline__ static float abs(float x) { return fabsf(x); }
  __device__ __forceinline__ static float reciprocal(float x) { return reciprocal_of(fmaxf(x, 1e-37f)); }
};

// What this thread holds of a row, and what is known of the whole.
template <Divergence D, class E, bool kAligned>
class Row {
 public:
  __device__ Row(const SpanKlArgs& a, char* memory)
      : a_(a), part_(a.vocab), together_(memory),
        teacher_(reinterpret_cast<uint4*>(memory + Together::kBytes) + threadIdx.x) {}

  __device__ __forceinline__ void load(int row) {
    const char *s = row_pointer(a_.student, row), *t = row_pointer(a_.teacher, row);
#pragma unroll
    for (int i = 0; i < kVectors; ++i) load_vectors(i, s, t);
  }

  __device__ __forceinline__ void read(int row) {
    wait_for_loads();
    float tops[2] = {-kInf, -kInf};
    each_entry([&](float s, float t, int) {
      tops[0] = fmaxf(tops[0], s);
      tops[1] = fmaxf(tops[1], t);
    });
    together_.max(tops);
    // Of a side that bans every token any finite centre makes the exponentials 0.
    top_s_ = tops[0] == -kInf ? 0 : tops[0];
    top_t_ = tops[1] == -kInf ? 0 : tops[1];

    label_ = a_.labels ? static_cast<int>(a_.labels[row]) : -1;
    const float rate = a_.inv_temperature * kLog2E;
    const bool softens = label_ >= 0 && a_.inv_temperature != 1;
    // sum_s, sum_t, ent_t, the cross moments; of the label; how often both sides are at their top.
    float sums[8] = {};
    each_entry([&](float s, float t, int column) {
      const float x_s = s - top_s_, x_t = t - top_t_;
      const float e_s = exp2_of(x_s * rate), e_t = exp2_of(x_t * rate);
      sums[0] += e_s;
      sums[1] += e_t;
      sums[2] += times_unless_zero(e_t, x_t);
      if constexpr (D != Divergence::reverse_kl && needs_gaps) {
        sums[3] += times_unless_zero(e_t, x_t - x_s);
      }
      if constexpr (D != Divergence::forward_kl && needs_gaps) {
        sums[4] += times_unless_zero(e_s, x_s - x_t);
      }
      if (softens) sums[5] += exp2_of(x_s * kLog2E);
      if (column == label_) sums[6] = x_s;
      sums[7] += s == tops[0] && t == tops[1];
    });
    together_.sum(sums);
    RowState<float> state{};
    state.sum_s = sums[0];
    state.sum_t = sums[1];
    state.ent_t = sums[2] * a_.inv_temperature;
    state.cross_t = sums[3] * a_.inv_temperature;
    state.cross_s = sums[4] * a_.inv_temperature;
    over_sum_s_ = 1 / state.sum_s;
    over_sum_t_ = 1 / state.sum_t;
    const float sum_h = softens ? sums[5] : sums[0];
    over_sum_h_ = 1 / sum_h;

    float value;
    if constexpr (D == Divergence::forward_kl) {
      value = state.cross_t / state.sum_t + logf(state.sum_s / state.sum_t);
    } else if constexpr (D == Divergence::reverse_kl) {
      centre_ = mean_gap(state);
      value = centre_ - logf(state.sum_s / state.sum_t);
    } else {
      if constexpr (D == Divergence::tvd) {
        log_ratio_ = log_ratio_of_sums(state, logf(state.sum_s / state.sum_t), 0.0f);
      }
      float mixed[2] = {};
      each_entry([&](float s, float t, int) {
        float q;
        const Term<float> one = term_of(s, t, q);
        mixed[0] += one.value;
        mixed[1] += q * one.g;
      });
      together_.sum(mixed);
      value = mixed[0];
      centre_ = mixed[1] + 0 * value;  // a NaN of the teacher's need not have reached g
    }
    if (threadIdx.x != 0 || cluster_rank() != 0) return;
    a_.per_token[row] = value < 0 ? 0 : value;  // rounding only: a divergence is not negative
    a_.cross_entropy[row] = label_ >= 0 ? logf(sum_h) - sums[6] : 0;
    a_.teacher_entropy[row] = teacher_entropy(state, logf(state.sum_t));
    a_.agreement[row] = sums[7] > 0;
  }

  // The gradient, and the row after this in its place.
  __device__ __forceinline__ void write(int row, int next) {
    if (!a_.dstudent.data) {
      if (next < a_.rows) load(next);
      return;
    }
    const float weight = a_.row_weights[row];
    const float scale = weight * a_.inv_temperature, hard_scale = weight * a_.ce_weight;
    char* d = row_pointer(a_.dstudent, row);
    const bool more = next < a_.rows;
    const char* s = more ? row_pointer(a_.student, next) : nullptr;
    const char* t = more ? row_pointer(a_.teacher, next) : nullptr;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int column = part_.column(i);
      if (column >= part_.end) break;
      uint4 out, teacher = teacher_[i * blockDim.x];
#pragma unroll
      for (int w = 0; w < kEntries / 2; ++w) {
        const uint32_t both_s = word_of(student_[i], w), both_t = word_of(teacher, w);
        word_of(out, w) = E::word(
            entry(E::low(both_s), E::low(both_t), column + 2 * w, scale, hard_scale),
            entry(E::high(both_s), E::high(both_t), column + 2 * w + 1, scale, hard_scale));
      }
      store_vector<kAligned>(d, column, part_.end, out);
      if (more) load_vectors(i, s, t);
    }
    zero<kAligned>(d, a_.vocab, a_.student_vocab);
  }

  __device__ __forceinline__ void skip(int row) const {
    if (threadIdx.x == 0 && cluster_rank() == 0) {
      a_.per_token[row] = a_.cross_entropy[row] = a_.teacher_entropy[row] = 0;
      a_.agreement[row] = 0;
    }
    if (a_.dstudent.data) zero<kAligned>(row_pointer(a_.dstudent, row), 0, a_.student_vocab);
  }

 private:
  static constexpr bool needs_gaps = from_state<D> || D == Divergence::tvd;

  __device__ __forceinline__ void load_vectors(int i, const char* s, const char* t) {
    const int column = part_.column(i);
    student_[i] = load_vector<E, kAligned>(s, column, part_.end);
    load_vector_async<E, kAligned>(teacher_ + i * blockDim.x, t, column, part_.end);
  }

  // f(student's, teacher's, column) of all that this thread holds.
  template <class F>
  __device__ __forceinline__ void each_entry(F f) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int column = part_.column(i);
      if (column >= part_.end) break;
      uint4 teacher = teacher_[i * blockDim.x];
#pragma unroll
      for (int w = 0; w < kEntries / 2; ++w) {
        const uint32_t both_s = word_of(student_[i], w), both_t = word_of(teacher, w);
        f(E::low(both_s), E::low(both_t), column + 2 * w);
        f(E::high(both_s), E::high(both_t), column + 2 * w + 1);
      }
    }
  }

  __device__ __forceinline__ Term<float> term_of(float s, float t, float& q) const {
    const float rate = a_.inv_temperature * kLog2E;
    const float x_s = s - top_s_, x_t = t - top_t_;
    q = exp2_of(x_s * rate) * over_sum_s_;
    const float p = exp2_of(x_t * rate) * over_sum_t_;
    return term<D, Math>(p, q, (x_s - x_t) * a_.inv_temperature - log_ratio_, a_.mix);
  }

  __device__ __forceinline__ float entry(float s, float t, int column, float scale, float hard_scale) const {
    const float x_s = s - top_s_;
    float out;
    if constexpr (from_state<D>) {
      const float rate = a_.inv_temperature * kLog2E, x_t = t - top_t_;
      const float q = exp2_of(x_s * rate) * over_sum_s_;
      if constexpr (D == Divergence::forward_kl) {
        out = forward_kl_gradient(exp2_of(x_t * rate) * over_sum_t_, q);
      } else {
        out = reverse_kl_gradient(q, (x_s - x_t) * a_.inv_temperature - centre_);
      }
    } else {
      float q;
      const Term<float> one = term_of(s, t, q);
      out = q * (one.g - centre_);
    }
    out *= scale;
    if (label_ >= 0) {
      const float hard = exp2_of(x_s * kLog2E) * over_sum_h_;
      out += hard_scale * (column == label_ ? hard - 1 : hard);
    }
    if (a_.inv_softcap != 0) {
      const float tanh = s * a_.inv_softcap;
      out *= 1 - tanh * tanh;
    }
    return out;
  }

  const SpanKlArgs& a_;
  const Part part_;
  Together together_;
  uint4 student_[kVectors];
  uint4* const teacher_;  // this thread's first vector of [kVectors, blockDim.x]
  float top_s_, top_t_, over_sum_s_, over_sum_t_, over_sum_h_;
  float centre_ = 0, log_ratio_ = 0;  // what the gradient subtracts, a mean over the row; tvd's
  int label_;
};

template <Divergence D, class E, bool kAligned>
__global__ void __launch_bounds__(kThreads, 1) kernel(const __grid_constant__ SpanKlArgs a) {
  Row<D, E, kAligned> rows(a, shared_memory());
  const int clusters = gridDim.x / cluster_size();
  // The first row from `row` on that is supervised; those before it are done with.
  const auto next_supervised = [&](int row) {
    while (row < a.rows && !a.supervised[row]) row += clusters;
    return row;
  };
  int row = blockIdx.x / cluster_size();
  const int first = next_supervised(row);
  if (first < a.rows) rows.load(first);
  for (int skipped = row; skipped < min(first, a.rows); skipped += clusters) rows.skip(skipped);
  for (row = first; row < a.rows;) {
    const int next = next_supervised(row + clusters);
    rows.read(row);
    rows.write(row, next);
    for (row += clusters; row < min(next, a.rows); row += clusters) rows.skip(row);
  }
}

template <Divergence D, class E>
void launch_aligned(const SpanKlArgs& a, int device, void* stream) {
  const bool vectors = aligned(a.student) && aligned(a.teacher) && aligned(a.dstudent);
  launch(vectors ? kernel<D, E, true> : kernel<D, E, false>, a, a.rows, a.vocab, Together::kBytes,
         kOfThread, device, stream);
}

}  // namespace

#ifndef SADKERN_DIVERGENCE
#error "compiled once per divergence: SADKERN_DIVERGENCE names it"
#endif
#define SADKERN_JOIN(a, b) a##b
#define SADKERN_LAUNCHER(name) SADKERN_JOIN(span_kl_, name)

void SADKERN_LAUNCHER(SADKERN_DIVERGENCE)(const SpanKlArgs& a, int device, void* stream) {
  constexpr Divergence d = Divergence::SADKERN_DIVERGENCE;
  if (a.dtype == DType::bfloat16) return launch_aligned<d, Bf16>(a, device, stream);
  return launch_aligned<d, Fp16>(a, device, stream);
}

}  // namespace sadkern
