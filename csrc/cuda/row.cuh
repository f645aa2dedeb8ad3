// How a row is held on chip. Its cluster of blocks splits it, a block's threads split their part by vectors of
// 16 bytes, and what a thread holds no other thread looks at: nothing waits for a row's arrival but those
// who asked for it, and as soon as an entry is done its place can take the next row's.
#pragma once

#include "device.cuh"
#include "../divergence.h"
#include "rows.h"

namespace sadkern {

constexpr int kEntries = 8;  // of a vector of 16 bytes
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kInf = __builtin_inff();

struct Bf16 {
  static constexpr uint32_t kBanned = 0xff80ff80u;  // two entries of -inf
  __device__ static float low(uint32_t word) { return __uint_as_float(word << 16); }
  __device__ static float high(uint32_t word) { return __uint_as_float(word & 0xffff0000u); }
  __device__ static uint32_t word(float low, float high) { return bf16_word(low, high); }
};

struct Fp16 {
  static constexpr uint32_t kBanned = 0xfc00fc00u;
  __device__ static float low(uint32_t word) { return fp32_of_fp16(static_cast<uint16_t>(word)); }
  __device__ static float high(uint32_t word) { return fp32_of_fp16(static_cast<uint16_t>(word >> 16)); }
  __device__ static uint32_t word(float low, float high) { return fp16_word(low, high); }
};

__device__ __forceinline__ char* row_pointer(const Rows& rows, int row) {
  const int64_t outer = row / rows.inner, inner = row % rows.inner;
  return static_cast<char*>(rows.data) + 2 * (outer * rows.outer_stride + inner * rows.inner_stride);
}

inline bool aligned(const Rows& rows) {
  return reinterpret_cast<uintptr_t>(rows.data) % 16 == 0 && rows.outer_stride % kEntries == 0 &&
         rows.inner_stride % kEntries == 0;
}

// The columns of a row that this block holds, [begin, end).
struct Part {
  int begin, end;

  __device__ explicit Part(int vocab) {
    const int vectors = (vocab + kEntries - 1) / kEntries, ranks = cluster_size();
    const int width = (vectors + ranks - 1) / ranks * kEntries;
    begin = min(cluster_rank() * width, vocab);
    end = min(begin + width, vocab);
  }
  // Where this thread's vector i begins.
  __device__ __forceinline__ int column(int i) const {
    return begin + (i * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x)) * kEntries;
  }
};

__device__ __forceinline__ uint32_t& word_of(uint4& x, int i) {
  return i == 0 ? x.x : i == 1 ? x.y : i == 2 ? x.z : x.w;
}

// The vector at `column` of a row, -inf from `end` on. kAligned: whole vectors lie at multiples of 16 bytes.
template <class E, bool kAligned>
__device__ __forceinline__ uint4 load_vector(const char* row, int column, int end) {
  if (kAligned && column + kEntries <= end) return load16(row + 2 * column);
  uint4 x{E::kBanned, E::kBanned, E::kBanned, E::kBanned};
#pragma unroll
  for (int i = 0; i < kEntries; ++i) {
    if (column + i >= end) break;
    const uint32_t entry = load2(row + 2 * (column + i));
    uint32_t& word = word_of(x, i / 2);
    word = i % 2 ? (word & 0xffffu) | entry << 16 : (word & 0xffff0000u) | entry;
  }
  return x;
}

template <class E, bool kAligned>
__device__ __forceinline__ void load_vector_async(uint4* slot, const char* row, int column, int end) {
  if (kAligned && column + kEntries <= end) {
    load16_async(slot, row + 2 * column);
  } else {
    *slot = load_vector<E, kAligned>(row, column, end);
  }
}

template <bool kAligned>
__device__ __forceinline__ void store_vector(char* row, int column, int end, uint4 x) {
  if (kAligned && column + kEntries <= end) return store16(row + 2 * column, x);
#pragma unroll
  for (int i = 0; i < kEntries; ++i) {
    if (column + i >= end) break;
    store2(row + 2 * (column + i), static_cast<uint16_t>(word_of(x, i / 2) >> (i % 2 ? 16 : 0)));
  }
}

// Columns [begin, end), by all of the cluster.
template <bool kAligned>
__device__ __forceinline__ void zero(char* row, int begin, int end) {
  const int step = cluster_size() * blockDim.x * kEntries;
  // The first vector may begin within what is done already.
  const int first = begin / kEntries * kEntries;
  int at = first + (cluster_rank() * blockDim.x + threadIdx.x) * kEntries;
  for (; at < end; at += step) {
    if (at >= begin) {
      store_vector<kAligned>(row, at, end, uint4{0, 0, 0, 0});
    } else {
      for (int i = begin; i < min(at + kEntries, end); ++i) store2(row + 2 * i, 0);
    }
  }
}

// The cluster's threads agree on a row's numbers. A sum's order depends on its shape alone: the same
// numbers come out every time.
class Together {
 public:
  static constexpr int kMost = 8;  // numbers at a time, blocks of a cluster
  static constexpr int kBytes = 4 * (32 * kMost + 2 * kMost * kMost);

  __device__ explicit Together(char* memory)
      : partial_(reinterpret_cast<float*>(memory)), parts_(partial_ + 32 * kMost) {}

  template <int N>
  __device__ __forceinline__ void sum(float (&x)[N]) {
    all(x, 0.0f, [](float a, float b) { return a + b; });
  }
  template <int N>
  __device__ __forceinline__ void max(float (&x)[N]) {
    all(x, -kInf, [](float a, float b) { return fmaxf(a, b); });
  }

 private:
  template <int N, class Op>
  __device__ __forceinline__ void all(float (&x)[N], float identity, Op op) {
    static_assert(N <= kMost);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const float all_lanes = over_lanes(x[n], op);
      if (lane == 0) partial_[warp * kMost + n] = all_lanes;
    }
    __syncthreads();
    // Of two turns' parts: who is ahead by one must not overwrite what others still read.
    float* parts = parts_ + turn_ * kMost * kMost;
    turn_ ^= 1;
    for (int n = warp; n < N; n += warps) {
      const float all_warps = over_lanes(lane < warps ? partial_[lane * kMost + n] : identity, op);
      if (lane < cluster_size()) {
        store_to_rank(reinterpret_cast<uint32_t*>(parts + cluster_rank() * kMost + n), lane,
                      __float_as_uint(all_warps));
      }
    }
    sync_cluster();
#pragma unroll
    for (int n = 0; n < N; ++n) {
      x[n] = parts[n];
      for (int rank = 1; rank < cluster_size(); ++rank) x[n] = op(x[n], parts[rank * kMost + n]);
    }
  }

  template <class Op>
  __device__ __forceinline__ static float over_lanes(float x, Op op) {
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) x = op(x, shuffle_xor(x, mask));
    return x;
  }

  float* const partial_;  // [warps, kMost]
  float* const parts_;    // [2, ranks, kMost]
  int turn_ = 0;
};

}  // namespace sadkern
