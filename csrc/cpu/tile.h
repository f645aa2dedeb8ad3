// A tile: kTile logits of one row as fp32, whatever their dtype, small enough for the L1 cache.
// Kernels see tiles only; dtype, temperature and the ragged end of a row are dealt with here.
#pragma once

#include "../dtype.h"
#include "simd.h"

namespace sadkern {
namespace {

constexpr int kTile = 2048;

SADKERN_INLINE float from_bfloat16(uint16_t h) {
  const uint32_t wide = static_cast<uint32_t>(h) << 16;
  float x;
  memcpy(&x, &wide, 4);
  return x;
}

// Round to nearest even; a NaN keeps a mantissa bit so that it is not rounded to infinity.
SADKERN_INLINE uint16_t to_bfloat16(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  const uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  return static_cast<uint16_t>((u & 0x7fffffff) > 0x7f800000 ? (u >> 16) | 0x40 : rounded);
}

// The exponent is rebased by a multiplication, which also normalises subnormal halves.
SADKERN_INLINE float from_float16(uint16_t h) {
  const uint32_t magnitude = static_cast<uint32_t>(h & 0x7fff) << 13;
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16;
  float x;
  memcpy(&x, &magnitude, 4);
  x *= 0x1p112f;
  uint32_t u;
  memcpy(&u, &x, 4);
  u = (u >= 0x47800000 ? u | 0x7f800000 : u) | sign;  // >= 65536: infinity or NaN
  memcpy(&x, &u, 4);
  return x;
}

SADKERN_INLINE uint16_t to_float16(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  const uint32_t sign = (u >> 16) & 0x8000;
  u &= 0x7fffffff;
  // Subnormal results: adding 0.5 aligns the mantissa so that the hardware rounds it.
  float magnitude;
  memcpy(&magnitude, &u, 4);
  const float aligned = magnitude + 0.5f;
  uint32_t small;
  memcpy(&small, &aligned, 4);
  small -= 0x3f000000;
  const uint32_t normal = (u - 0x38000000 + 0xfff + ((u >> 13) & 1)) >> 13;
  const uint32_t finite = u < 0x38800000 ? small : normal;
  const uint32_t special = u > 0x7f800000 ? 0x7e00 : 0x7c00;
  return static_cast<uint16_t>((u >= 0x477ff000 ? special : finite) | sign);
}

// Entries [begin, begin + n) of a row, times `scale`, filled up with -inf to a whole tile.
// Returns the row itself where it can be used as it is, else `buffer`.
SADKERN_INLINE const float* load_tile(const void* row, DType dtype, int64_t begin, int n,
                                      float scale, float* buffer) {
  if (dtype == DType::float32) {
    const float* from = static_cast<const float*>(row) + begin;
    if (n == kTile && scale == 1) return from;
    memcpy(buffer, from, n * sizeof(float));
  } else {
    const uint16_t* from = static_cast<const uint16_t*>(row) + begin;
    if (dtype == DType::bfloat16) {
      for (int j = 0; j < n; ++j) buffer[j] = from_bfloat16(from[j]);
    } else {
      for (int j = 0; j < n; ++j) buffer[j] = from_float16(from[j]);
    }
  }
  for (int j = n; j < kTile; ++j) buffer[j] = -kInf;
  if (scale != 1) {
    for (int j = 0; j < n; ++j) buffer[j] *= scale;
  }
  return buffer;
}

// 2- or 4-byte entries to memory; past the caches where the caller says so.
SADKERN_INLINE void write_bytes(char* to, const char* from, int64_t bytes, bool past_caches) {
  if (!past_caches) {
    memcpy(to, from, bytes);
    return;
  }
  constexpr int64_t kVector = sizeof(Vec);
  int64_t head = -reinterpret_cast<intptr_t>(to) & (kVector - 1);
  if (head > bytes) head = bytes;
  memcpy(to, from, head);
  int64_t at = head;
  for (; at + kVector <= bytes; at += kVector) {
    Vec v;
    memcpy(&v, from + at, kVector);
    stream(reinterpret_cast<float*>(to + at), v);
  }
  memcpy(to + at, from + at, bytes - at);
}

SADKERN_INLINE void store_tile(void* row, DType dtype, int64_t begin, int n, const float* tile,
                               bool past_caches) {
  char* to = static_cast<char*>(row) + begin * size_of(dtype);
  if (dtype == DType::float32) {
    write_bytes(to, reinterpret_cast<const char*>(tile), n * 4, past_caches);
    return;
  }
  alignas(64) uint16_t narrow[kTile];
  if (dtype == DType::bfloat16) {
    for (int j = 0; j < n; ++j) narrow[j] = to_bfloat16(tile[j]);
  } else {
    for (int j = 0; j < n; ++j) narrow[j] = to_float16(tile[j]);
  }
  write_bytes(to, reinterpret_cast<const char*>(narrow), n * 2, past_caches);
}

}  // namespace
}  // namespace sadkern
