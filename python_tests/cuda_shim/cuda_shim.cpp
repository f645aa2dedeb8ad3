#include "cuda_shim.h"

#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <memory>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#else
#define __sanitizer_start_switch_fiber(fake, bottom, size) (void)(fake)
#define __sanitizer_finish_switch_fiber(fake, bottom, size) (void)(fake)
#define ASAN_POISON_MEMORY_REGION(p, size) (void)(p)
#define ASAN_UNPOISON_MEMORY_REGION(p, size) (void)(p)
#endif

namespace shim {
namespace {

constexpr size_t kStack = 64 << 10;
constexpr size_t kGuard = 1 << 10;  // after a block's shared memory

enum Waits { kNot, kForWarp, kForBlock, kForCluster, kEnded };

struct Copy {
  void* to;
  const void* from;
  int bytes;
};

struct Fibre {
  Thread who;
  ucontext_t context;
  char* stack;
  Waits waits = kNot;
  float given = 0;  // to the others of its warp
  std::vector<Copy> copies;
};

struct Cluster {
  Launch launch;
  std::vector<Fibre> fibres;
  std::vector<std::unique_ptr<char[]>> shared;
  const std::function<void()>* kernel;
  ucontext_t scheduler;
  const void* scheduler_stack = nullptr;
  size_t scheduler_size = 0;
  Fibre* running = nullptr;
};

Cluster* now = nullptr;
bool backwards = false;

void entry() {
  __sanitizer_finish_switch_fiber(nullptr, &now->scheduler_stack, &now->scheduler_size);
  (*now->kernel)();
  now->running->waits = kEnded;
  __sanitizer_start_switch_fiber(nullptr, now->scheduler_stack, now->scheduler_size);
  swapcontext(&now->running->context, &now->scheduler);
}

void wait(Waits what) {
  Fibre& own = *now->running;
  own.waits = what;
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, now->scheduler_stack, now->scheduler_size);
  swapcontext(&own.context, &now->scheduler);
  __sanitizer_finish_switch_fiber(fake, &now->scheduler_stack, &now->scheduler_size);
}

void resume(Fibre& fibre) {
  now->running = &fibre;
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, fibre.stack, kStack);
  swapcontext(&now->scheduler, &fibre.context);
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
}

// Runs [begin, end) of fibres, which are parts of `part` each, until all wait for more than `what` says: a
// part goes as far as it gets by itself before another does anything. Whether any went on.
bool run_parts(size_t begin, size_t end, Waits what) {
  const size_t part = what == kForWarp ? 1 : what == kForBlock ? 32 : now->launch.threads.x;
  auto& fibres = now->fibres;
  bool any = false;
  while (true) {
    for (size_t n = begin; n < end; n += part) {
      const size_t at = backwards ? begin + end - part - n : n;
      if (part > 1) {
        any |= run_parts(at, at + part, what == kForBlock ? kForWarp : kForBlock);
      } else if (fibres[at].waits == kNot) {
        any = true;
        resume(fibres[at]);
      }
    }
    for (size_t i = begin; i < end; ++i) {
      if (fibres[i].waits != what) return any;
    }
    for (size_t i = begin; i < end; ++i) fibres[i].waits = kNot;
  }
}

void run_cluster(const Launch& launch, int first_block, const std::function<void()>& kernel, char* stacks) {
  Cluster cluster;
  now = &cluster;
  cluster.launch = launch;
  cluster.kernel = &kernel;
  const size_t threads = launch.threads.x, all = threads * launch.cluster;
  for (int rank = 0; rank < launch.cluster; ++rank) {
    const size_t size = launch.shared + kGuard;
    // (new gives 16 bytes' alignment.)
    cluster.shared.emplace_back(new char[size]);
    memset(cluster.shared[rank].get(), 0xff, size);  // NaN
    ASAN_POISON_MEMORY_REGION(cluster.shared[rank].get() + launch.shared, kGuard);
  }
  cluster.fibres.resize(all);
  for (size_t i = 0; i < all; ++i) {
    Fibre& fibre = cluster.fibres[i];
    fibre.who.thread.x = i % threads;
    fibre.who.rank = i / threads;
    fibre.who.block.x = first_block + fibre.who.rank;
    fibre.stack = stacks + i * kStack;
    getcontext(&fibre.context);
    fibre.context.uc_stack.ss_sp = fibre.stack;
    fibre.context.uc_stack.ss_size = kStack;
    makecontext(&fibre.context, entry, 0);
  }
  while (run_parts(0, all, kForCluster)) {
  }
  for (const Fibre& fibre : cluster.fibres) {
    if (fibre.waits != kEnded) {
      fprintf(stderr, "cuda_shim: threads wait for each other at different places\n");
      abort();
    }
  }
  for (int rank = 0; rank < launch.cluster; ++rank) {
    ASAN_UNPOISON_MEMORY_REGION(cluster.shared[rank].get() + launch.shared, kGuard);
  }
  now = nullptr;
}

struct Watched {
  const char* begin;
  size_t count;
  uint8_t *loads, *stores;
};
std::vector<Watched> watched;
uint64_t loaded = 0, stored = 0;

void count(const void* p, int bytes, uint8_t* Watched::*counts) {
  for (const Watched& one : watched) {
    const ptrdiff_t at = static_cast<const char*>(p) - one.begin;
    for (int i = 0; i < bytes; i += 2) {
      const ptrdiff_t entry = (at + i) / 2;
      if (at + i >= 0 && entry < static_cast<ptrdiff_t>(one.count)) ++(one.*counts)[entry];
    }
  }
}

}  // namespace

const Thread& thread() { return now->running->who; }
const Launch& launch() { return now->launch; }
char* shared(int rank) { return now->shared[rank].get(); }
void barrier(int scope) { wait(scope == 0 ? kForWarp : scope == 1 ? kForBlock : kForCluster); }

float exchange(float x, int lane_mask) {
  Fibre* own = now->running;
  own->given = x;
  wait(kForWarp);
  const float theirs = now->fibres[(own - now->fibres.data()) ^ lane_mask].given;
  wait(kForWarp);  // nobody gives anew before all have taken
  return theirs;
}

void on_load(const void* p, int bytes) {
  loaded += bytes;
  count(p, bytes, &Watched::loads);
}
void on_store(const void* p, int bytes) {
  stored += bytes;
  count(p, bytes, &Watched::stores);
}
void copy_later(void* to, const void* from, int bytes) { now->running->copies.push_back({to, from, bytes}); }
void copy_now() {
  for (const Copy& one : now->running->copies) memcpy(one.to, one.from, one.bytes);
  now->running->copies.clear();
}

void run(const Launch& launch, const std::function<void()>& kernel) {
  const size_t bytes = kStack * launch.threads.x * launch.cluster;
  char* stacks = static_cast<char*>(
      mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  if (stacks == MAP_FAILED) abort();
  for (unsigned block = 0; block < launch.grid.x; block += launch.cluster) {
    run_cluster(launch, block, kernel, stacks);
  }
  munmap(stacks, bytes);
}

}  // namespace shim

// For Python.
#pragma GCC visibility push(default)
extern "C" {
void shim_run_backwards(bool yes) { shim::backwards = yes; }  // the last thread first
// Counts how often each of the 16-bit entries from `p` on is read and written.
void shim_watch(const void* p, size_t entries, uint8_t* loads, uint8_t* stores) {
  shim::watched.push_back({static_cast<const char*>(p), entries, loads, stores});
}
void shim_unwatch() { shim::watched.clear(); }
// Bytes of global memory, since they were asked for last.
uint64_t shim_loaded() { return std::exchange(shim::loaded, 0); }
uint64_t shim_stored() { return std::exchange(shim::stored, 0); }
}
#pragma GCC visibility pop

cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorName(cudaError_t) { return "cudaErrorInvalidValue"; }
const char* cudaGetErrorString(cudaError_t) { return "invalid argument"; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr name, int) {
  *value = name == cudaDevAttrComputeCapabilityMajor ? 9 : 2;
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int bytes) {
  return bytes <= 227 << 10 ? cudaSuccess : cudaErrorInvalidValue;
}

namespace sadkern {
namespace {

uint32_t bf16(float x) {
  uint32_t bits = bits_as<uint32_t>(x);
  if (x != x) return 0x7fff;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
uint32_t fp16(float x) {
  const _Float16 half = static_cast<_Float16>(x);
  return x != x ? 0x7fff : bits_as<uint16_t>(half);
}

}  // namespace

uint32_t bf16_word(float low, float high) { return bf16(low) | bf16(high) << 16; }
uint32_t fp16_word(float low, float high) { return fp16(low) | fp16(high) << 16; }
float fp32_of_fp16(uint16_t bits) { return static_cast<float>(bits_as<_Float16>(bits)); }

}  // namespace sadkern
