// Elements of logits as the kernels see them: a vector of fp32, whatever stands in memory.
// Each type says how `load` widens and `store` rounds kLanes entries; `stream` bypasses the caches.
// `kExpDegree`, `kLogDegree`: what keeps their errors well below the type's own rounding.
#pragma once

#include "../dtype.h"
#include "simd.h"

namespace sadkern {
namespace {

struct Float32 {
  using Raw = float;
  static constexpr Raw kNegInf = -kInf;
  static constexpr int kExpDegree = 6, kLogDegree = 9;
  SADKERN_INLINE static Vec load(const Raw* from) { return sadkern::load(from); }
  SADKERN_INLINE static void store(Raw* to, Vec v) { sadkern::store(to, v); }
  SADKERN_INLINE static void stream(Raw* to, Vec v) { sadkern::stream(to, v); }
};

// Written out, since compilers take detours here.
SADKERN_INLINE VecU widen(const uint16_t* from) {
#if defined(__AVX512F__)
  return (VecU)_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(__AVX2__)
  return (VecU)_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
  Half h;
  memcpy(&h, from, sizeof h);
  return __builtin_convertvector(h, VecU);
#endif
}
SADKERN_INLINE Half narrow(VecU v) {
#if defined(__AVX512F__)
  return (Half)_mm512_cvtepi32_epi16((__m512i)v);
#elif defined(__AVX2__)
  const __m128i low = _mm256_castsi256_si128((__m256i)v);
  const __m128i high = _mm256_extracti128_si256((__m256i)v, 1);
  return (Half)_mm_packus_epi32(low, high);
#else
  return __builtin_convertvector(v, Half);
#endif
}

struct BFloat16 {
  using Raw = uint16_t;
  static constexpr Raw kNegInf = 0xff80;
  static constexpr int kExpDegree = 5, kLogDegree = 7;
#if defined(__AVX512F__)
  // One shuffle each way: entry k goes to, or comes from, the upper half of lane k.
  SADKERN_INLINE static Vec load(const Raw* from) {
    const __m512i entries =
        _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    return (Vec)_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, (__m512i)(lane_indices() << 16), entries);
  }
  SADKERN_INLINE static Half upper_halves(VecU v) {
    const __m512i upper = (__m512i)((lane_indices() * 4 + 1) | ((lane_indices() * 4 + 3) << 16));
    return (Half)_mm512_castsi512_si256(_mm512_permutexvar_epi16(upper, (__m512i)v));
  }
#else
  SADKERN_INLINE static Vec load(const Raw* from) { return (Vec)(widen(from) << 16); }
  SADKERN_INLINE static Half upper_halves(VecU v) { return narrow(v >> 16); }
#endif
  SADKERN_INLINE static void store(Raw* to, Vec v) {
    const Half h = rounded(v);
    memcpy(to, &h, sizeof h);
  }
  SADKERN_INLINE static void stream(Raw* to, Vec v) { sadkern::stream(to, rounded(v)); }

 private:
  // To nearest even. NaNs need no care: those of arithmetic and those widened from bf16 have low
  // bits of zero, so that no carry leaves their mantissa.
  SADKERN_INLINE static Half rounded(Vec v) {
    const VecU u = (VecU)v;
    return upper_halves(u + 0x7fff + ((u >> 16) & 1));
  }
};

struct Float16 {
  using Raw = uint16_t;
  static constexpr Raw kNegInf = 0xfc00;
  static constexpr int kExpDegree = 5, kLogDegree = 7;
#if defined(__AVX512F__)
  SADKERN_INLINE static Vec load(const Raw* from) {
    return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  }
  SADKERN_INLINE static Half rounded(Vec v) {
    return (Half)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
#elif defined(__F16C__)
  SADKERN_INLINE static Vec load(const Raw* from) {
    return (Vec)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  }
  SADKERN_INLINE static Half rounded(Vec v) {
    return (Half)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
#else
  // The exponent is rebased by a multiplication, which also normalises subnormal halves.
  SADKERN_INLINE static Vec load(const Raw* from) {
    const VecU h = widen(from);
    const VecU u = (VecU)((Vec)((h & 0x7fff) << 13) * 0x1p112f);
    const VecU special = u >= 0x47800000 ? u | 0x7f800000 : u;  // >= 65536: infinity or NaN
    return (Vec)(special | (h & 0x8000) << 16);
  }
  SADKERN_INLINE static Half rounded(Vec v) {
    const VecU sign = ((VecU)v >> 16) & 0x8000;
    const VecU u = (VecU)v & 0x7fffffff;
    // Subnormal results: adding 0.5 aligns the mantissa so that the processor rounds it.
    const VecU small = (VecU)((Vec)u + 0.5f) - 0x3f000000;
    const VecU normal = (u - 0x38000000 + 0xfff + ((u >> 13) & 1)) >> 13;
    const VecU finite = u < 0x38800000 ? small : normal;
    const VecU special = u > 0x7f800000 ? VecU{} + 0x7e00 : VecU{} + 0x7c00;
    return narrow((u >= 0x477ff000 ? special : finite) | sign);
  }
#endif
  SADKERN_INLINE static void store(Raw* to, Vec v) {
    const Half h = rounded(v);
    memcpy(to, &h, sizeof h);
  }
  SADKERN_INLINE static void stream(Raw* to, Vec v) { sadkern::stream(to, rounded(v)); }
};

// `f` of the element type that stands for `dtype`, as a value of it.
template <class F>
bool with_element(DType dtype, F f) {
  switch (dtype) {
    case DType::float32: return f(Float32{});
    case DType::bfloat16: return f(BFloat16{});
    case DType::float16: return f(Float16{});
  }
  return false;
}

}  // namespace
}  // namespace sadkern
