// Memory for large gradients, recycled.
//
// A training step frees the last gradient and asks for one of about its size. From the system such
// memory comes as pages to be zeroed, which takes as long as computing the gradient does. So the block
// last freed is kept for the next one; if it is very large, the system may have its pages back when it
// runs short (MADV_FREE). Blocks are advised to be of huge pages, which cuts page faults by 512.
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
