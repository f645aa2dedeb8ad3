// Memory for large gradients and tiles, recycled.
//
// A training step frees what the last one used and asks for as much again. From the system such memory
// comes as pages to be zeroed, which takes as long as computing a gradient does. So the few blocks last
// freed are kept for the next; of a very large one the system may have the pages back when it runs short
// (MADV_FREE). Blocks are advised to be of huge pages, which cuts page faults by 512.
#pragma once

#include <cstddef>
#include <utility>

namespace sadkern {

class Buffer {
 public:
  explicit Buffer(std::size_t bytes);  // uninitialised; throws std::bad_alloc
  Buffer(Buffer&& other) noexcept : block_(std::exchange(other.block_, {})), bytes_(other.bytes_) {}
  Buffer& operator=(Buffer&&) = delete;
  ~Buffer();

  void* data() const { return block_.data; }
  std::size_t bytes() const { return bytes_; }

  struct Block {
    void* data = nullptr;
    std::size_t capacity = 0;
  };

 private:
  Block block_;
  std::size_t bytes_;
};

}  // namespace sadkern
