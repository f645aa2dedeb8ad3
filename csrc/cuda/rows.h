// Where rows of logits are, as Python tells it.
#pragma once

#include <stdint.h>

#include "../dtype.h"

namespace sadkern {

// Logits whose leading dimensions lie like [N / inner, inner]; strides in entries.
struct Rows {
  void* data;
  int inner;
  int64_t outer_stride, inner_stride;
};

}  // namespace sadkern
