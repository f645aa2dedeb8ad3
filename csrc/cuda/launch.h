// How a kernel over rows is launched: how many blocks share a row, and what is refused.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>

#ifdef __CUDACC__
#include <cuda_runtime.h>
#else
#include "cuda_shim.h"
#endif

namespace sadkern {

constexpr int kLongestPart = 32768;  // entries of a row that one block can hold
constexpr int kMostBlocks = 8;       // of a cluster that every chip with clusters has

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // which would otherwise be found by someone else
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorName(error) + ", " +
                           cudaGetErrorString(error));
}

// `rows` rows of `vocab` 16-bit entries; shared memory in bytes of a block, and of each of its threads.
template <class Args>
void launch(void (*kernel)(Args), const Args& args, int rows, int vocab, size_t of_block, size_t of_thread,
            int device, void* stream) {
  if (rows == 0) return;
  check(cudaSetDevice(device), "cudaSetDevice");
  const auto attribute = [&](cudaDeviceAttr name) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, name, device), "cudaDeviceGetAttribute");
    return value;
  };
  const int most = attribute(cudaDevAttrComputeCapabilityMajor) >= 9 ? kMostBlocks : 1;
  int blocks = 1;  // that share a row
  while (blocks < most && vocab > blocks * kLongestPart) blocks *= 2;
  if (vocab > blocks * kLongestPart) {
    throw std::invalid_argument("rows of " + std::to_string(vocab) + " entries: this chip holds at most " +
                                std::to_string(most * kLongestPart));
  }
  // Four vectors a thread, by whole warps.
  const int vectors = ((vocab + 7) / 8 + blocks - 1) / blocks;
  const int threads = std::max(32, ((vectors + 3) / 4 + 31) / 32 * 32);
  const size_t bytes = of_block + of_thread * threads;
  check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                             cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)),
        "cudaFuncSetAttribute");

  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = blocks;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &cluster;
  config.numAttrs = blocks > 1;

  // As many clusters as run at a time: each takes its rows one after the other.
  int resident = 0;
  if (blocks > 1) {
    config.gridDim = dim3(blocks);
    check(cudaOccupancyMaxActiveClusters(&resident, kernel, &config), "cudaOccupancyMaxActiveClusters");
  } else {
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, threads, bytes),
          "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
    resident *= attribute(cudaDevAttrMultiProcessorCount);
  }
  if (resident == 0) throw std::runtime_error("a block of this kernel does not fit the chip");
  config.gridDim = dim3(std::min(rows, resident) * blocks);
  check(cudaLaunchKernelEx(&config, kernel, args), "cudaLaunchKernelEx");
}

}  // namespace sadkern
