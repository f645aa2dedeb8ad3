#include "buffer.h"

#include <sys/mman.h>

#include <cstdint>
#include <mutex>
#include <new>
#include <vector>

namespace sadkern {
namespace {

constexpr std::size_t kHugePage = std::size_t{2} << 20;

// What is kept without offering it back to the system, which costs some 5 % of the kernel's time.
constexpr std::size_t kPlain = std::size_t{256} << 20;

constexpr std::size_t kBlocks = 4;  // kept at most: tiles, gradients of hidden states, head and logits
constexpr std::size_t kKept = std::size_t{512} << 20;  // bytes of them, beside the newest

std::mutex guard;
// What was freed last, the newest last; `guard` is held to touch it. Never destroyed: a Buffer may outlive
// statics.
std::vector<Buffer::Block>& kept = *[] {
  auto* blocks = new std::vector<Buffer::Block>;
  blocks->reserve(kBlocks + 1);
  return blocks;
}();

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
    auto best = kept.end();
    for (auto block = kept.begin(); block != kept.end(); ++block) {
      if (bytes > block->capacity || block->capacity / 2 > bytes) continue;
      if (best == kept.end() || block->capacity < best->capacity) best = block;
    }
    if (best != kept.end()) {
      block_ = *best;
      kept.erase(best);
    }
  }
  if (!block_.data) block_ = map(bytes);
}

Buffer::~Buffer() {
  if (!block_.data) return;
#ifdef MADV_FREE
  if (block_.capacity > kPlain) madvise(block_.data, block_.capacity, MADV_FREE);
#endif
  const std::lock_guard<std::mutex> lock(guard);
  kept.push_back(block_);
  std::size_t total = 0;
  for (const Block& block : kept) total += block.capacity;
  while (kept.size() > 1 && (kept.size() > kBlocks || total - block_.capacity > kKept)) {
    munmap(kept.front().data, kept.front().capacity);
    total -= kept.front().capacity;
    kept.erase(kept.begin());
  }
}

}  // namespace sadkern
