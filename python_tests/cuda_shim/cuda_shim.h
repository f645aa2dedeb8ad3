// CUDA enough to run this project's kernels on the CPU, to test them where there is no GPU: the blocks of a
// cluster together, clusters in sequence, a fibre a thread. A fibre runs until it has to wait for others, so
// that what lacks a barrier reads what is not there yet: memory of a block begins as NaN, and what a copy
// behind the thread's back brings is there only once it has waited for it.
#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct uint4 {
  uint32_t x, y, z, w;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1) : x(x), y(1), z(1) {}
};

namespace shim {

// The thread that runs.
struct Thread {
  dim3 thread, block;
  int rank;  // of its block in the cluster
};
struct Launch {
  dim3 grid, threads;
  int cluster;
  size_t shared;
};
const Thread& thread();
const Launch& launch();

char* shared(int rank);
void barrier(int scope);  // 0: of a warp, 1: of a block, 2: of a cluster
float exchange(float x, int lane_mask);

// Global memory: what is read and written is counted, of watched memory two bytes at a time.
void on_load(const void* p, int bytes);
void on_store(const void* p, int bytes);
void copy_later(void* to, const void* from, int bytes);
void copy_now();

void run(const Launch& launch, const std::function<void()>& kernel);

}  // namespace shim

// The built-in variables: numbers that are asked for when they are read.
namespace shim {
inline unsigned thread_x() { return thread().thread.x; }
inline unsigned block_x() { return thread().block.x; }
inline unsigned threads_x() { return launch().threads.x; }
inline unsigned grid_x() { return launch().grid.x; }
template <unsigned (*kNow)()>
struct Index {
  struct {
    operator unsigned() const { return kNow(); }
  } x;
};
}  // namespace shim
inline const shim::Index<shim::thread_x> threadIdx{};
inline const shim::Index<shim::block_x> blockIdx{};
inline const shim::Index<shim::threads_x> blockDim{};
inline const shim::Index<shim::grid_x> gridDim{};

// The runtime, of a chip of two multiprocessors with clusters.

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
enum cudaDeviceAttr { cudaDevAttrComputeCapabilityMajor, cudaDevAttrMultiProcessorCount };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension };
using cudaStream_t = void*;
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

cudaError_t cudaSetDevice(int device);
cudaError_t cudaGetLastError();
const char* cudaGetErrorName(cudaError_t);
const char* cudaGetErrorString(cudaError_t);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int device);
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int bytes);

template <class Kernel>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, Kernel, const cudaLaunchConfig_t*) {
  *clusters = 2;
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int threads, size_t) {
  *blocks = 1;
  return threads <= 1024 ? cudaSuccess : cudaErrorInvalidValue;
}
template <class Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Args), const Args& args) {
  const int cluster = config->numAttrs ? config->attrs->val.clusterDim.x : 1;
  const shim::Launch launch{config->gridDim, config->blockDim, cluster, config->dynamicSmemBytes};
  shim::run(launch, [&] { kernel(args); });
  return cudaSuccess;
}

// What a thread does.

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
template <class To, class From>
To bits_as(From x) {
  To to;
  memcpy(&to, &x, sizeof to);
  return to;
}
inline float __uint_as_float(uint32_t x) { return bits_as<float>(x); }
inline uint32_t __float_as_uint(float x) { return bits_as<uint32_t>(x); }
inline void __syncthreads() { shim::barrier(1); }
inline int atomicAdd(int* at, int x) {
  const int before = *at;
  *at += x;
  return before;
}

namespace sadkern {  // as csrc/cuda/device.cuh has it

inline char* shared_memory() { return shim::shared(shim::thread().rank); }

inline uint4 load16(const void* p) {
  shim::on_load(p, 16);
  return *static_cast<const uint4*>(p);
}
inline uint16_t load2(const void* p) {
  shim::on_load(p, 2);
  return *static_cast<const uint16_t*>(p);
}
inline void store16(void* p, uint4 x) {
  shim::on_store(p, 16);
  *static_cast<uint4*>(p) = x;
}
inline void store2(void* p, uint16_t x) {
  shim::on_store(p, 2);
  *static_cast<uint16_t*>(p) = x;
}
inline void load16_async(uint4* shared, const void* p) {
  shim::on_load(p, 16);
  shim::copy_later(shared, p, 16);
}
inline void wait_for_loads() { shim::copy_now(); }

inline float shuffle_xor(float x, int mask) { return shim::exchange(x, mask); }

inline int cluster_size() { return shim::launch().cluster; }
inline int cluster_rank() { return shim::thread().rank; }
inline uint32_t* in_rank(const uint32_t* shared, int rank) {
  const ptrdiff_t offset = reinterpret_cast<const char*>(shared) - shim::shared(shim::thread().rank);
  return reinterpret_cast<uint32_t*>(shim::shared(rank) + offset);
}
inline void store_to_rank(uint32_t* shared, int rank, uint32_t x) { *in_rank(shared, rank) = x; }
inline uint32_t load_from_rank(const uint32_t* shared, int rank) { return *in_rank(shared, rank); }
inline void sync_cluster() { shim::barrier(2); }

// (An instruction's error is up to 2 ulp; here none is added.)
inline float exp2_of(float x) {
  const float y = exp2f(x);
  return y < 0x1p-126f ? 0 : y;
}
inline float reciprocal_of(float x) { return 1 / x; }

uint32_t bf16_word(float low, float high);
uint32_t fp16_word(float low, float high);
float fp32_of_fp16(uint16_t bits);

}  // namespace sadkern
