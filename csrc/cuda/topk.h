// Top-k, log-normaliser, entropy and tail mass of rows of 16-bit logits on an NVIDIA GPU, rows on chip: what
// the kernel is given.
#pragma once

#include "rows.h"

namespace sadkern {

constexpr int kMostTokens = 1024;

struct TopkArgs {
  int rows;  // N
  int vocab;
  DType dtype;
  Rows logits;  // [N, V]
  int k;        // <= V and kMostTokens
  float inv_temperature;

  int32_t* ids;      // [N, K] by logit, ties by id
  float* logprobs;   // [N, K]
  float* tail_mass;  // [N] of what is not among the K
  float* entropy;    // [N]
  float* lse;        // [N] log sum exp(logits / temperature)
};

constexpr int kTopkShared = 17928;  // bytes of shared memory of a block

void topk(const TopkArgs&, int device, void* stream);

}  // namespace sadkern
