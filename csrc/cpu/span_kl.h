// span_kl over logits x logits on the CPU: what the kernel is given and where its builds are found.
// What it is told of the student and of the loss serves a top-k teacher too.
#pragma once

#include <stdint.h>

#include "../divergence.h"
#include "../dtype.h"

namespace sadkern {

constexpr int kMaxLeading = 8;

// Rows of logits [..., V] in any layout whose last stride is 1; strides in elements.
struct Rows {
  void* data;
  int64_t strides[kMaxLeading];
};

struct RowArgs {
  int leading;                 // how many leading dimensions
  int64_t sizes[kMaxLeading];  // their sizes; N is their product
  int64_t vocab;               // V: the common prefix of both vocabularies
  int64_t student_vocab;       // >= V; gradient columns from V on are zero

  Rows student;   // [..., student_vocab]
  Rows dstudent;  // [..., student_vocab], may be the student's own memory; data == nullptr: no gradient
  DType dtype;    // of both, and of the teacher's logits

  const uint8_t* supervised;   // [N] rows that are read; the others get zeros
  const float* row_weights;    // [N] factor of each row's gradient
  const int64_t* labels;       // [N] or nullptr; negative: no hard label in this row

  Divergence divergence;
  float mix;          // beta or skew
  float temperature;
  float ce_weight;
  float softcap;      // c of student logits that are c tanh(x / c): the gradient is that of x; 0: none

  float* per_token;        // [N] divergence
  float* cross_entropy;    // [N] at temperature 1, 0 without label
  float* teacher_entropy;  // [N]
  uint8_t* agreement;      // [N] 1 where both sides have the same top entry
};

struct SpanKlArgs : RowArgs {
  Rows teacher;  // [..., >= V]
};

// False where scratch memory could not be had. The same source is compiled per instruction set.
bool span_kl_baseline(const SpanKlArgs&, int threads);
bool span_kl_avx2(const SpanKlArgs&, int threads);
bool span_kl_avx512(const SpanKlArgs&, int threads);

}  // namespace sadkern
