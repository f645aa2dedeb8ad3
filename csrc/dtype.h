// Element types of logits. The numbers are part of the bindings' face.
#pragma once

#include <stdint.h>

namespace sadkern {

enum class DType : int { float32, bfloat16, float16 };

constexpr int64_t size_of(DType dtype) { return dtype == DType::float32 ? 4 : 2; }

}  // namespace sadkern
