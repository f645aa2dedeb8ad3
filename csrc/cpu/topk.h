// Top-k, log-normaliser, entropy and tail mass of rows of logits in one read: what the kernel is given
// and where its builds are found.
#pragma once

#include "span_kl.h"

namespace sadkern {

struct TopkArgs {
  int leading;
  int64_t sizes[kMaxLeading];  // N is their product
  int64_t vocab;
  Rows logits;  // [..., V]
  DType dtype;
  int64_t k;    // <= V
  float temperature;

  int32_t* ids;      // [N, K] by logit, ties by id
  float* logprobs;   // [N, K]
  float* tail_mass;  // [N] of what is not among the K
  float* entropy;    // [N]
  float* lse;        // [N] log sum exp(logits / temperature)
};

bool topk_baseline(const TopkArgs&, int threads);
bool topk_avx2(const TopkArgs&, int threads);
bool topk_avx512(const TopkArgs&, int threads);

// Moves the k largest of n keys to the front, largest first if `sorted`. k <= n. In a source of its own
// (select.cpp): of the standard library nothing may be compiled for one instruction set.
void largest_first(uint64_t* keys, int64_t n, int64_t k, bool sorted);

}  // namespace sadkern
