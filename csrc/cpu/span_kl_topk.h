// span_kl over logits x top-k on the CPU: what the kernel is given and where its builds are found.
#pragma once

#include "span_kl.h"

namespace sadkern {

// What becomes of the mass that a top-k teacher leaves out.
enum class Tail : int { bucket, renormalize, none };

struct SpanKlTopkArgs : RowArgs {
  const int32_t* ids;           // [N, K] distinct within a row, < V; negative: no entry
  const float* logprobs;        // [N, K]
  const float* tail;            // [N] mass left out, or nullptr: what is missing from 1
  const float* entropy;         // [N] of the whole distribution, or nullptr: of what is given
  int64_t k;
  Tail tail_mode;
  float* tail_mass;             // [N] the mass left out
  int64_t* repeated;            // set to a row that holds an id twice; untouched where none does
};

bool span_kl_topk_baseline(const SpanKlTopkArgs&, int threads);
bool span_kl_topk_avx2(const SpanKlTopkArgs&, int threads);
bool span_kl_topk_avx512(const SpanKlTopkArgs&, int threads);

}  // namespace sadkern
