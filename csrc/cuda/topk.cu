// Top-k, log-normaliser, entropy and tail mass of rows of logits, each read once.
//
// The row stays packed in registers. The k-th largest of its vectors' maxima is a bound: k entries at least
// reach it, few more do, and those few are sorted. Where too many do (ties, or all that is large in the same
// vectors), the bound is moved to the k-th largest entry itself, of equals to that with the k-th lowest id.

#include "topk.h"

#include "launch.h"
#include "row.cuh"

namespace sadkern {
namespace {

constexpr int kThreads = 1024, kVectors = 4;
static_assert(kThreads * kVectors * kEntries == kLongestPart);
constexpr int kKeyBits = 16, kIdBits = 20;
static_assert(kMostBlocks * kLongestPart < 1 << kIdBits);
constexpr int kCandidates = 2 * kMostTokens;

// Of 16 bits of a logit an integer of the same order; -0 is 0.
__device__ __forceinline__ int key_of(uint32_t bits) {
  bits = bits == 0x8000u ? 0 : bits & 0xffffu;
  return static_cast<int>(bits & 0x8000u ? ~bits & 0xffffu : bits | 0x8000u);
}
__device__ __forceinline__ uint32_t bits_of(int key) {
  return static_cast<uint32_t>(key & 0x8000 ? key & 0x7fff : ~key & 0xffff);
}

// Integers that sort as candidates do: larger logits first, and of equal ones the smaller id. 0 is none.
__device__ __forceinline__ uint64_t candidate_of(int key, int id) {
  return static_cast<uint64_t>(key) << 32 | (0xffffffffu - static_cast<uint32_t>(id));
}
__device__ __forceinline__ int key_of_candidate(uint64_t x) { return static_cast<int>(x >> 32); }
__device__ __forceinline__ int id_of_candidate(uint64_t x) {
  return static_cast<int>(0xffffffffu - static_cast<uint32_t>(x));
}

struct Shared {
  char together[Together::kBytes];
  uint64_t candidates[kCandidates];  // of the cluster, in its first block
  int count;                         // of this block's candidates
};
static_assert(sizeof(Shared) == kTopkShared);

template <class E, bool kAligned>
class Row {
 public:
  __device__ Row(const TopkArgs& a, char* memory)
      : a_(a), part_(a.vocab), shared_(*reinterpret_cast<Shared*>(memory)), together_(memory) {}

  __device__ __forceinline__ void load(int row) {
    const char* x = row_pointer(a_.logits, row);
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      logits_[i] = load_vector<E, kAligned>(x, part_.column(i), part_.end);
    }
  }

  __device__ __forceinline__ void select(int row, int next) {
    float tops[1] = {-kInf};
    each_entry([&](float x, uint32_t, int, int) { tops[0] = fmaxf(tops[0], x); });
    together_.max(tops);
    const float top = tops[0] == -kInf ? 0 : tops[0], rate = a_.inv_temperature * kLog2E;
    float sums[2] = {};  // of exponentials, and their first moment
    each_entry([&](float x, uint32_t, int, int) {
      const float e = exp2_of((x - top) * rate);
      sums[0] += e;
      sums[1] += times_unless_zero(e, x - top);
    });
    together_.sum(sums);
    const float log_sum = logf(sums[0]);

    const int found = collect();
    if (cluster_rank() == 0) sort(found);
    sync_cluster();
    const uint64_t last = last_candidate();
    float tail[1] = {};
    each_entry([&](float x, uint32_t bits, int column, int) {
      const bool left = column < part_.end && candidate_of(key_of(bits), column) < last;
      tail[0] += left ? exp2_of((x - top) * rate) : 0;
    });
    together_.sum(tail);
    if (next < a_.rows) load(next);

    if (cluster_rank() != 0) return;
    for (int i = threadIdx.x; i < a_.k; i += blockDim.x) {
      const uint64_t one = shared_.candidates[i];
      const int64_t at = static_cast<int64_t>(row) * a_.k + i;
      a_.ids[at] = id_of_candidate(one);
      a_.logprobs[at] = (E::low(bits_of(key_of_candidate(one))) - top) * a_.inv_temperature - log_sum;
    }
    if (threadIdx.x != 0) return;
    a_.lse[row] = top * a_.inv_temperature + log_sum;
    a_.entropy[row] = log_sum - sums[1] / sums[0] * a_.inv_temperature;
    a_.tail_mass[row] = tail[0] / sums[0];
  }

 private:
  // Everything up to the last `id` at `key`, and above it.
  struct Bound {
    int key, id;
    __device__ __forceinline__ bool reached(int other, int column) const {
      return other > key || (other == key && column <= id);
    }
  };

  // Candidates of all blocks, in the first one's memory, in any order; how many.
  __device__ __forceinline__ int collect() {
    if (threadIdx.x == 0) shared_.count = 0;
    Bound bound{bound_of_maxima(), 1 << kIdBits};
    int before;
    int found = count(bound, before);
    if (found > kCandidates) {
      bound = exact();
      found = count(bound, before);
    }
    each_entry([&](float, uint32_t bits, int column, int) {
      const int key = key_of(bits);
      if (column >= part_.end || !bound.reached(key, column)) return;
      const uint64_t one = candidate_of(key, column);
      uint32_t* to = reinterpret_cast<uint32_t*>(shared_.candidates + before + atomicAdd(&shared_.count, 1));
      store_to_rank(to, 0, static_cast<uint32_t>(one));
      store_to_rank(to + 1, 0, static_cast<uint32_t>(one >> 32));
    });
    sync_cluster();
    return found;
  }

  // The k-th largest of the vectors' maxima; 0 if they are fewer.
  __device__ __forceinline__ int bound_of_maxima() {
    int highest[kVectors];
#pragma unroll
    for (int i = 0; i < kVectors; ++i) highest[i] = -1;
    each_entry([&](float, uint32_t bits, int column, int i) {
      if (column < part_.end) highest[i] = max(highest[i], key_of(bits));
    });
    return largest_that(kKeyBits, [&](int trial) {
      int n = 0;
#pragma unroll
      for (int i = 0; i < kVectors; ++i) n += highest[i] >= trial;
      return over_cluster(n) >= a_.k;
    });
  }

  // What exactly k entries reach.
  __device__ __forceinline__ Bound exact() {
    const auto reach = [&](int key, int id) {
      int before;
      return count(Bound{key, id}, before);
    };
    constexpr int kAll = 1 << kIdBits;
    const int key = largest_that(kKeyBits, [&](int trial) { return reach(trial, kAll) >= a_.k; });
    const int id = largest_that(kIdBits, [&](int trial) { return reach(key, trial - 1) < a_.k; });
    return {key, id};
  }

  // The largest number of so many bits of which `holds` is true, as it is of 0 and of what is below it.
  template <class F>
  __device__ __forceinline__ static int largest_that(int bits, F holds) {
    int found = 0;
    for (int bit = bits - 1; bit >= 0; --bit) {
      const int trial = found | 1 << bit;
      if (holds(trial)) found = trial;
    }
    return found;
  }

  // How many entries reach a bound; how many of those are in blocks `before` this.
  __device__ __forceinline__ int count(const Bound& bound, int& before) {
    int n = 0;
    each_entry([&](float, uint32_t bits, int column, int) {
      n += column < part_.end && bound.reached(key_of(bits), column);
    });
    float of_rank[kMostBlocks];
#pragma unroll
    for (int rank = 0; rank < kMostBlocks; ++rank) of_rank[rank] = rank == cluster_rank() ? n : 0;
    together_.sum(of_rank);
    float all = 0, lower = 0;
#pragma unroll
    for (int rank = 0; rank < kMostBlocks; ++rank) {
      all += of_rank[rank];
      lower += rank < cluster_rank() ? of_rank[rank] : 0;
    }
    before = static_cast<int>(lower);
    return static_cast<int>(all);
  }
  __device__ __forceinline__ int over_cluster(int n) {
    float all[1] = {static_cast<float>(n)};
    together_.sum(all);
    return static_cast<int>(all[0]);
  }

  // This block's candidates, the first first; bitonic.
  __device__ __forceinline__ void sort(int found) {
    uint64_t* x = shared_.candidates;
    int size = 2;
    while (size < found) size *= 2;
    for (int i = found + threadIdx.x; i < size; i += blockDim.x) x[i] = 0;
    __syncthreads();
    for (int width = 2; width <= size; width *= 2) {
      for (int step = width / 2; step > 0; step /= 2) {
        for (int i = threadIdx.x; i < size / 2; i += blockDim.x) {
          const int a = 2 * i - (i & (step - 1)), b = a + step;
          const bool falls = (a & width) == 0;
          const uint64_t x_a = x[a], x_b = x[b];
          if (falls ? x_a < x_b : x_a > x_b) {
            x[a] = x_b;
            x[b] = x_a;
          }
        }
        __syncthreads();
      }
    }
  }

  __device__ __forceinline__ uint64_t last_candidate() const {
    const uint32_t* from = reinterpret_cast<const uint32_t*>(shared_.candidates + a_.k - 1);
    return static_cast<uint64_t>(load_from_rank(from + 1, 0)) << 32 | load_from_rank(from, 0);
  }

  // f(logit, its bits, column, which vector) of all that this thread holds.
  template <class F>
  __device__ __forceinline__ void each_entry(F f) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int column = part_.column(i);
      if (column >= part_.end) break;
#pragma unroll
      for (int w = 0; w < kEntries / 2; ++w) {
        const uint32_t both = word_of(logits_[i], w);
        f(E::low(both), both & 0xffffu, column + 2 * w, i);
        f(E::high(both), both >> 16, column + 2 * w + 1, i);
      }
    }
  }

  const TopkArgs& a_;
  const Part part_;
  Shared& shared_;
  Together together_;
  uint4 logits_[kVectors];
};

template <class E, bool kAligned>
__global__ void __launch_bounds__(kThreads, 1) kernel(const __grid_constant__ TopkArgs a) {
  Row<E, kAligned> rows(a, shared_memory());
  const int clusters = gridDim.x / cluster_size();
  int row = blockIdx.x / cluster_size();
  if (row < a.rows) rows.load(row);
  for (; row < a.rows; row += clusters) rows.select(row, row + clusters);
}

template <class E>
void launch_aligned(const TopkArgs& a, int device, void* stream) {
  launch(aligned(a.logits) ? kernel<E, true> : kernel<E, false>, a, a.rows, a.vocab, sizeof(Shared), 0,
         device, stream);
}

}  // namespace

void topk(const TopkArgs& a, int device, void* stream) {
  if (a.k > kMostTokens || a.k > a.vocab) {
    throw std::invalid_argument("k=" + std::to_string(a.k) + ": expected at most " +
                                std::to_string(std::min(kMostTokens, a.vocab)));
  }
  if (a.dtype == DType::bfloat16) return launch_aligned<Bf16>(a, device, stream);
  return launch_aligned<Fp16>(a, device, stream);
}

}  // namespace sadkern
