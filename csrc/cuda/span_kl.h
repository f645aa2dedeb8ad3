// span_kl over logits x logits on an NVIDIA GPU, rows on chip: what the kernel is given. 16-bit logits.
#pragma once

#include "../divergence.h"
#include "rows.h"

namespace sadkern {

struct SpanKlArgs {
  int rows;           // N
  int vocab;          // V: the common prefix of both vocabularies
  int student_vocab;  // >= V; gradient columns from V on are zero
  DType dtype;

  Rows student;   // [N, student_vocab]
  Rows teacher;   // [N, >= V]
  Rows dstudent;  // [N, student_vocab], may be the student's own memory; data == nullptr: no gradient

  const uint8_t* supervised;  // [N] rows that are read; the others get zeros
  const float* row_weights;   // [N] factor of each row's gradient
  const int64_t* labels;      // [N] or nullptr; negative: no hard label in this row

  Divergence divergence;
  float mix;  // beta or skew
  float inv_temperature;
  float ce_weight;
  float inv_softcap;  // 1 / c of student logits that are c tanh(x / c); 0: none

  float* per_token;        // [N] divergence
  float* cross_entropy;    // [N] at temperature 1, 0 without label
  float* teacher_entropy;  // [N]
  uint8_t* agreement;      // [N] 1 where both sides have the same top entry
};

constexpr int kSpanKlShared = 67072;  // bytes of shared memory of the largest block

// One launcher a divergence, each compiled by itself.
void span_kl_forward_kl(const SpanKlArgs&, int device, void* stream);
void span_kl_reverse_kl(const SpanKlArgs&, int device, void* stream);
void span_kl_jsd(const SpanKlArgs&, int device, void* stream);
void span_kl_skew_forward_kl(const SpanKlArgs&, int device, void* stream);
void span_kl_skew_reverse_kl(const SpanKlArgs&, int device, void* stream);
void span_kl_tvd(const SpanKlArgs&, int device, void* stream);

}  // namespace sadkern
