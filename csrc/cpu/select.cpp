#include <algorithm>
#include <functional>

#include "topk.h"

namespace sadkern {

void largest_first(uint64_t* keys, int64_t n, int64_t k, bool sorted) {
  if (k < n) std::nth_element(keys, keys + k, keys + n, std::greater<>());
  if (sorted) std::sort(keys, keys + k, std::greater<>());
}

}  // namespace sadkern
