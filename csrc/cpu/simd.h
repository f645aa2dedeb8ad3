// Vectors of the instruction set that this translation unit is compiled for.
//
// Only compiler vector extensions: the same lines become AVX-512, AVX2, SSE2 or NEON. Everything has
// internal linkage, and no standard header with inline code is included: a function compiled for
// AVX-512 must never be the one that the linker keeps for an older processor.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

// The name of a kernel's build for one instruction set: SADKERN_ISA comes from the command line.
#define SADKERN_JOIN_(a, b) a##b
#define SADKERN_JOIN(a, b) SADKERN_JOIN_(a, b)
#define SADKERN_OF_ISA(kernel) SADKERN_JOIN(kernel##_, SADKERN_ISA)

namespace sadkern {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t VecI __attribute__((vector_size(4 * kLanes)));
typedef uint32_t VecU __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Half __attribute__((vector_size(2 * kLanes)));

constexpr float kInf = __builtin_inff();

SADKERN_INLINE Vec splat(float x) { return Vec{} + x; }
SADKERN_INLINE Vec load(const float* from) {
  Vec v;
  memcpy(&v, from, sizeof v);
  return v;
}
SADKERN_INLINE void store(float* to, Vec v) { memcpy(to, &v, sizeof v); }
SADKERN_INLINE VecI lane_indices() {
  VecI v;
  for (int i = 0; i < kLanes; ++i) v[i] = i;
  return v;
}
SADKERN_INLINE VecI bits(Vec v) { return (VecI)v; }
SADKERN_INLINE Vec from_bits(VecI v) { return (Vec)v; }
// Where either is NaN, b.
SADKERN_INLINE Vec max(Vec a, Vec b) {
#if defined(__AVX512F__)
  return (Vec)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX__)
  return (Vec)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

SADKERN_INLINE double sum(Vec v) {
#if defined(__AVX512F__)
  const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256((__m512)v));
  const __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps((__m512)v, 1));
  return _mm512_reduce_add_pd(_mm512_add_pd(low, high));
#else
  double total = 0;
  for (int i = 0; i < kLanes; ++i) total += v[i];
  return total;
#endif
}
SADKERN_INLINE float max(Vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)v);
#else
  float best = v[0];
  for (int i = 1; i < kLanes; ++i) best = v[i] > best ? v[i] : best;
  return best;
#endif
}
// `f` over the vectors that `at(j)` gives for j = 0, kLanes, .. < n, beginning with `start`, four at a time:
// one alone would wait for the last.
template <class At, class F>
SADKERN_INLINE Vec fold(int n, Vec start, At at, F f) {
  Vec a = start, b = start, c = start, d = start;
  int j = 0;
  for (; j + 3 * kLanes < n; j += 4 * kLanes) {
    a = f(at(j), a);
    b = f(at(j + kLanes), b);
    c = f(at(j + 2 * kLanes), c);
    d = f(at(j + 3 * kLanes), d);
  }
  for (; j < n; j += kLanes) a = f(at(j), a);
  return f(f(a, b), f(c, d));
}
SADKERN_INLINE bool any(VecI v) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)v, (__m512i)v) != 0;
#elif defined(__AVX2__)
  return !_mm256_testz_si256((__m256i)v, (__m256i)v);
#else
  int32_t seen = 0;
  for (int i = 0; i < kLanes; ++i) seen |= v[i];
  return seen != 0;
#endif
}

// Bit k is set where lane k of a comparison holds.
SADKERN_INLINE uint32_t lane_mask(VecI v) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)v);
#elif defined(__AVX2__)
  return _mm256_movemask_ps((__m256)v);
#else
  uint32_t mask = 0;
  for (int i = 0; i < kLanes; ++i) mask |= (v[i] & 1u) << i;
  return mask;
#endif
}

// v, which the compiler may then not fuse, unrounded, into an addition.
SADKERN_INLINE Vec rounded(Vec v) {
#if defined(__x86_64__)
  __asm__("" : "+v"(v));
#elif defined(__aarch64__)
  __asm__("" : "+w"(v));
#endif
  return v;
}

// a * b - c, rounded once.
SADKERN_INLINE Vec multiply_subtract(Vec a, float b, Vec c) {
#if defined(__AVX512F__)
  return (Vec)_mm512_fmsub_ps((__m512)a, (__m512)splat(b), (__m512)c);
#elif defined(__FMA__)
  return (Vec)_mm256_fmsub_ps((__m256)a, (__m256)splat(b), (__m256)c);
#elif defined(__aarch64__)
  return a * b - c;  // the compiler fuses it
#else
  if (b == 1) return a - c;
  typedef double Wide __attribute__((vector_size(8 * kLanes)));
  return __builtin_convertvector(
      __builtin_convertvector(a, Wide) * double{b} - __builtin_convertvector(c, Wide), Vec);
#endif
}

// x log2(e) - n, for n the integer next to it.
SADKERN_INLINE Vec exponent_fraction(Vec x, Vec n) {
#if defined(__FMA__) || defined(__AVX512F__) || defined(__aarch64__)
  return multiply_subtract(x, 1.44269504f, n);
#else
  // Without a fused operation the product's rounding would be all that is left: log 2 in two parts, of
  // which n times the first is exact.
  return ((x - n * 0.693359375f) + n * 2.12194440e-4f) * 1.44269504f;
#endif
}

// e^x for x <= 0, as 2^n 2^f with |f| <= 1/2 and a minimax polynomial that is 1 at 0: of degree 6
// (2e-9 relative) or 5 (1e-7). Below kExpFloor, where it would not be a normal number, it is 0; NaN
// stays NaN.
constexpr float kExpFloor = -87.3f;
template <int kDegree = 6>
SADKERN_INLINE Vec exp(Vec x) {
  const Vec shifter = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vec shifted = x * 1.44269504f + shifter;
  const Vec n = shifted - shifter;
  const Vec f = exponent_fraction(x, n);
  Vec poly;
  if constexpr (kDegree == 6) {
    poly = splat(1.5353361959569156e-4f);
    poly = poly * f + 1.3398873852565885e-3f;
    poly = poly * f + 9.61843691766262e-3f;
    poly = poly * f + 5.5503323674201965e-2f;
    poly = poly * f + 0.24022647738456726f;
    poly = poly * f + 0.6931471824645996f;
  } else {
    static_assert(kDegree == 5);
    poly = splat(1.3264727139609294e-3f);
    poly = poly * f + 9.6715126399544004e-3f;
    poly = poly * f + 5.5507337434717349e-2f;
    poly = poly * f + 0.24022242085376805f;
    poly = poly * f + 0.69314697759899113f;
  }
  poly = poly * f + 1.0f;
  return x < kExpFloor ? Vec{} : from_bits(bits(poly) + (bits(shifted) << 23));
}

// 1 / x to about 1 ulp for normal x.
SADKERN_INLINE Vec reciprocal(Vec x) {
#if defined(__AVX512F__)
  const Vec guess = (Vec)_mm512_rcp14_ps((__m512)x);
  return guess + guess * (1.0f - x * guess);
#else
  return 1.0f / x;
#endif
}

// log x for normal x > 0: of x = 2^n (1 + f) with 1 + f in [sqrt 1/2, sqrt 2) it is
// n log 2 + f + f^2 Q(f), Q a minimax polynomial that makes the whole one of degree 9 (relative error
// 3e-8) or 7 (2e-6, and less by f^3 near 1). log 0 comes out as about -88, a number that 0 can be
// multiplied by; of a NaN, too, some number does.
template <int kDegree = 9>
SADKERN_INLINE Vec log(Vec x) {
  const VecI exponent = (bits(x) - 0x3f3504f3) >> 23;
  const Vec f = from_bits(bits(x) - (exponent << 23)) - 1.0f;
  Vec poly;
  if constexpr (kDegree == 9) {
    poly = splat(8.734845370e-2f);
    poly = poly * f - 1.430752277e-1f;
    poly = poly * f + 1.491797268e-1f;
    poly = poly * f - 1.657050848e-1f;
    poly = poly * f + 1.996207237e-1f;
    poly = poly * f - 2.500175536e-1f;
    poly = poly * f + 3.333395123e-1f;
    poly = poly * f - 4.999999106e-1f;
  } else {
    static_assert(kDegree == 7);
    poly = splat(1.178190187e-1f);
    poly = poly * f - 1.840719134e-1f;
    poly = poly * f + 2.044218779e-1f;
    poly = poly * f - 2.494383305e-1f;
    poly = poly * f + 3.332086205e-1f;
    poly = poly * f - 0.5f;
  }
  const Vec of_mantissa = f * f * poly + f;
  return __builtin_convertvector(exponent, Vec) * 0.693147181f + of_mantissa;
}

// Stores that bypass the caches: the line is not read first. `to` is aligned to the vector's size.
SADKERN_INLINE void stream(float* to, Vec v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(to, (__m512)v);
#elif defined(__AVX__)
  _mm256_stream_ps(to, (__m256)v);
#elif defined(__x86_64__)
  _mm_stream_ps(to, (__m128)v);
#else
  store(to, v);
#endif
}
SADKERN_INLINE void stream(uint16_t* to, Half v) {
#if defined(__AVX512F__)
  _mm256_stream_si256(reinterpret_cast<__m256i*>(to), (__m256i)v);
#elif defined(__AVX__)
  _mm_stream_si128(reinterpret_cast<__m128i*>(to), (__m128i)v);
#elif defined(__x86_64__)
  _mm_stream_si64(reinterpret_cast<long long*>(to), (long long)v);
#else
  memcpy(to, &v, sizeof v);
#endif
}
SADKERN_INLINE void stream_fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

}  // namespace
}  // namespace sadkern
