#include "buffer.h"

#include <sys/mman.h>

#include <cstdint>
#include <mutex>
#include <new>

namespace sadkern {
namespace {

constexpr std::size_t kHugePage = std::size_t{2} << 20;

// What is kept without offering it back to the system, which costs some 5 % of the kernel's time.
constexpr std::size_t kPlain = std::size_t{256} << 20;

std::mutex guard;
Buffer::Block kept[2];  // what was freed last, the newest first; `guard` is held to touch it

Buffer::Block map(std::size_t bytes) {
  const std::size_t capacity = (bytes + kHugePage - 1) / kHugePage * kHugePage;
  // One huge page more than needed; what stands before and behind an aligned block goes back.
  void* mapped = mmap(nullptr, capacity + kHugePage, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) throw std::bad_alloc();
  const auto address = reinterpret_cast<std::uintptr_t>(mapped);
  const std::uintptr_t aligned = (address + kHugePage - 1) / kHugePage * kHugePage;
  char* const data = static_cast<char*>(mapped) + (aligned - address);
  if (aligned != address) munmap(mapped, aligned - address);
  munmap(data + capacity, kHugePage - (aligned - address));
#ifdef MADV_HUGEPAGE
  madvise(data, capacity, MADV_HUGEPAGE);
#endif
  return {data, capacity};
}

}  // namespace

Buffer::Buffer(std::size_t bytes) : bytes_(bytes) {
  {
    const std::lock_guard<std::mutex> lock(guard);
    for (Block& block : kept) {
      if (block_.data || bytes > block.capacity || block.capacity / 2 > bytes) continue;
      block_ = std::exchange(block, {});
    }
  }
  if (!block_.data) block_ = map(bytes);
}

Buffer::~Buffer() {
  if (!block_.data) return;
#ifdef MADV_FREE
  if (block_.capacity > kPlain) madvise(block_.data, block_.capacity, MADV_FREE);
#endif
  {
    const std::lock_guard<std::mutex> lock(guard);
    if (kept[0].data) std::swap(kept[0], kept[1]);
    std::swap(kept[0], block_);
  }
  if (block_.data) munmap(block_.data, block_.capacity);
}

}  // namespace sadkern
