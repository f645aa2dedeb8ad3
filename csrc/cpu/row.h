// How a row is read and written: by tiles of whole vectors.
#pragma once

#include "element.h"
#include "span_kl.h"

namespace sadkern {
namespace {

// What stays in the L1 cache between a tile's maxima and its exponentials.
constexpr int kTile = 2048;

SADKERN_INLINE char* row_pointer(const SpanKlArgs& a, const Rows& rows, int64_t i) {
  int64_t offset = 0;
  for (int d = a.leading - 1; d >= 0; --d) {
    offset += i % a.sizes[d] * rows.strides[d];
    i /= a.sizes[d];
  }
  return static_cast<char*>(rows.data) + offset * size_of(a.dtype);
}

// A row's logits by tiles of whole vectors: a ragged end is a copy, filled up with -inf.
template <class E>
class Tiles {
 public:
  void open(const void* row, int64_t vocab) {
    row_ = static_cast<const Raw*>(row);
    whole_ = vocab % kLanes == 0 ? vocab : vocab / kTile * kTile;
    const int rest = static_cast<int>(vocab - whole_);
    if (rest == 0) return;
    memcpy(end_, row_ + whole_, rest * sizeof(Raw));
    for (int j = rest; j < rest + kLanes; ++j) end_[j] = E::kNegInf;
  }
  SADKERN_INLINE const typename E::Raw* operator[](int64_t begin) const {
    return begin < whole_ ? row_ + begin : end_;
  }

 private:
  using Raw = typename E::Raw;
  const Raw* row_ = nullptr;
  int64_t whole_ = 0;
  alignas(64) Raw end_[kTile + kLanes];
};

// A row's gradient, written by tiles.
template <class E>
class Gradient {
 public:
  void open(void* row, bool past_caches) {
    row_ = static_cast<Raw*>(row);
    past_caches_ = past_caches;
  }

  // Entries [begin, begin + n), of which `entries(j)` gives the vector at begin + j.
  template <class F>
  SADKERN_INLINE void write(int64_t begin, int n, F entries) const {
    constexpr uintptr_t kVector = kLanes * sizeof(Raw);
    Raw* to = row_ + begin;
    if (n % kLanes != 0) {
      alignas(64) Raw buffer[kTile];
      for (int j = 0; j < n; j += kLanes) E::store(buffer + j, entries(j));
      memcpy(to, buffer, n * sizeof(Raw));
    } else if (past_caches_ && reinterpret_cast<uintptr_t>(to) % kVector == 0) {
      for (int j = 0; j < n; j += kLanes) E::stream(to + j, entries(j));
    } else {
      for (int j = 0; j < n; j += kLanes) E::store(to + j, entries(j));
    }
  }

 private:
  using Raw = typename E::Raw;
  Raw* row_ = nullptr;
  bool past_caches_ = false;
};

}  // namespace
}  // namespace sadkern
