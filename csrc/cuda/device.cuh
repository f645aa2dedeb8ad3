// What the kernels ask of the machine beneath C++: memory, warps, clusters of blocks, conversions. Compiled
// without nvcc the same names come from python_tests/cuda_shim, which runs the kernels on the CPU.
#pragma once

#include <stdint.h>

#ifndef __CUDACC__
#include "cuda_shim.h"
#else
#include <cuda_runtime.h>

namespace sadkern {

constexpr unsigned kWarp = 0xffffffffu;

// Of the memory that a launch gives to each block.
__device__ __forceinline__ char* shared_memory() {
  extern __shared__ uint4 memory[];
  return reinterpret_cast<char*>(memory);
}

// Rows are read once and written once: caches need not keep them.
__device__ __forceinline__ uint4 load16(const void* p) { return __ldcs(static_cast<const uint4*>(p)); }
__device__ __forceinline__ uint16_t load2(const void* p) {
  return __ldcs(static_cast<const unsigned short*>(p));
}
__device__ __forceinline__ void store16(void* p, uint4 x) { __stcs(static_cast<uint4*>(p), x); }
__device__ __forceinline__ void store2(void* p, uint16_t x) {
  __stcs(static_cast<unsigned short*>(p), x);
}

// To shared memory, behind the thread's back until it waits for all that it has asked for.
__device__ __forceinline__ void load16_async(uint4* shared, const void* p) {
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(p) : "memory");
}
__device__ __forceinline__ void wait_for_loads() { asm volatile("cp.async.wait_all;" ::: "memory"); }

__device__ __forceinline__ float shuffle_xor(float x, int mask) {
  return __shfl_xor_sync(kWarp, x, mask);
}

// Blocks that share a row. Before sm_90 each is by itself.
__device__ __forceinline__ int cluster_size() {
#if __CUDA_ARCH__ >= 900
  unsigned size;
  asm("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(size));
  return size;
#else
  return 1;
#endif
}
__device__ __forceinline__ int cluster_rank() {
#if __CUDA_ARCH__ >= 900
  unsigned rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
#else
  return 0;
#endif
}
// Where `shared` is in the block of rank `rank`, and a word there.
#if __CUDA_ARCH__ >= 900
__device__ __forceinline__ unsigned address_in_rank(const void* shared, int rank) {
  const unsigned here = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  unsigned there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(here), "r"(rank));
  return there;
}
#endif
__device__ __forceinline__ void store_to_rank(uint32_t* shared, int rank, uint32_t x) {
#if __CUDA_ARCH__ >= 900
  asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(address_in_rank(shared, rank)), "r"(x) : "memory");
#else
  *shared = x;
#endif
}
__device__ __forceinline__ uint32_t load_from_rank(const uint32_t* shared, int rank) {
#if __CUDA_ARCH__ >= 900
  uint32_t x;
  asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(x) : "r"(address_in_rank(shared, rank)) : "memory");
  return x;
#else
  return *shared;
#endif
}
__device__ __forceinline__ void sync_cluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  __syncthreads();
#endif
}

// 2^x and 1 / x in an instruction; what would be denormal is 0.
__device__ __forceinline__ float exp2_of(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float reciprocal_of(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Two entries as a word, the first in its low half; rounded to the nearest.
__device__ __forceinline__ uint32_t bf16_word(float low, float high) {
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
__device__ __forceinline__ uint32_t fp16_word(float low, float high) {
  uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
__device__ __forceinline__ float fp32_of_fp16(uint16_t bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
}

}  // namespace sadkern
#endif
