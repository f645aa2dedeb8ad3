// Selection and sorting of a few hundred distinct keys without a branch that depends on them: what std does
// is mostly mispredictions at that length.
#include <algorithm>
#include <functional>

#include "topk.h"

namespace sadkern {
namespace {

constexpr int64_t kShort = 16;
constexpr int kRounds = 40;  // of halving; what is left then is of an unlucky order

void sort_short(uint64_t* keys, int64_t n) {
  for (int64_t i = 1; i < n; ++i) {
    const uint64_t key = keys[i];
    int64_t j = i;
    for (; j > 0 && keys[j - 1] < key; --j) keys[j] = keys[j - 1];
    keys[j] = key;
  }
}

// Moves what is larger than a pivot to the front and says how much that is: at least 1, at most n - 2.
int64_t partition(uint64_t* keys, int64_t n) {
  const uint64_t a = keys[0], b = keys[n / 2], c = keys[n - 1];
  const uint64_t pivot = std::max(std::min(a, b), std::min(std::max(a, b), c));
  int64_t larger = 0;
  for (int64_t i = 0; i < n; ++i) {
    const uint64_t key = keys[i];
    keys[i] = keys[larger];
    keys[larger] = key;
    larger += key > pivot;
  }
  return larger;
}

void select(uint64_t* keys, int64_t n, int64_t k) {
  for (int round = 0; n > kShort; ++round) {
    if (round == kRounds) return std::nth_element(keys, keys + k, keys + n, std::greater<>());
    const int64_t larger = partition(keys, n);
    if (larger == k) return;
    if (larger > k) {
      n = larger;
    } else {
      keys += larger, n -= larger, k -= larger;
    }
  }
  sort_short(keys, n);
}

void sort(uint64_t* keys, int64_t n, int rounds = kRounds) {
  while (n > kShort) {
    if (rounds-- == 0) return std::sort(keys, keys + n, std::greater<>());
    const int64_t larger = partition(keys, n);
    sort(keys, larger, rounds);
    keys += larger, n -= larger;
  }
  sort_short(keys, n);
}

}  // namespace

void largest_first(uint64_t* keys, int64_t n, int64_t k, bool sorted) {
  if (k < n) select(keys, n, k);
  if (sorted) sort(keys, k);
}

}  // namespace sadkern
