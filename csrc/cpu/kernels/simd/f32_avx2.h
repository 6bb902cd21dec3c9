// Vec of eight floats for AVX2 + FMA + F16C.
#pragma once

#include <immintrin.h>

#include "convert.h"

namespace mnv2 {
namespace {

struct Vec {
  static constexpr int kLanes = 8;
  static constexpr int kPanel = 2;                      // vectors in a panel
  static constexpr int kRows[kPanel + 1] = {0, 12, 6};  // rows of a tile, by vectors: 16 registers
  static constexpr int kLowLanes = 0;                   // there is no cheaper half
  __m256 v;

  static __m256i first(int count) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static Vec load_first(const float* p, int count) { return {_mm256_maskload_ps(p, first(count))}; }
  static Vec broadcast(float x) { return {_mm256_set1_ps(x)}; }
  static Vec zero() { return {_mm256_setzero_ps()}; }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
  // Past the caches; p is aligned to the vector.
  void stream(float* p) const { _mm256_stream_ps(p, v); }
  void store_first(float* p, int count) const { _mm256_maskstore_ps(p, first(count), v); }
};

// Keeps x in a register. The compiler would rather load it again for each of its uses.
inline void keep(Vec& x) { asm("" : "+x"(x.v)); }
inline void end_of_streams() { _mm_sfence(); }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec fma_low(const float* a, Vec b, Vec c) { return fma(Vec::broadcast(*a), b, c); }
inline Vec add(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vec sub(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Vec mul(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
// min and max return their second operand if either is NaN: a NaN in x comes through, as in PyTorch's clamp.
inline Vec clamp(Vec x, Vec lo, Vec hi) { return {_mm256_min_ps(hi.v, _mm256_max_ps(lo.v, x.v))}; }

// By lanes: v if lo < x < hi, else 0.
inline Vec inside(Vec x, Vec lo, Vec hi, Vec v) {
  const __m256 within = _mm256_and_ps(_mm256_cmp_ps(x.v, lo.v, _CMP_GT_OQ), _mm256_cmp_ps(x.v, hi.v, _CMP_LT_OQ));
  return {_mm256_and_ps(within, v.v)};
}

inline void widen(DType dtype, const void* from, float* to, int64_t count) {
  const uint16_t* in = static_cast<const uint16_t*>(from);
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i));
    const __m256 f = dtype == DType::kBFloat16 ? _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16))
                                               : _mm256_cvtph_ps(h);
    _mm256_storeu_ps(to + i, f);
  }
  widen_each(dtype, in + i, to + i, count - i);
}

inline __m128i bfloat16_from(__m256 f) {
  const __m256i bits = _mm256_castps_si256(f);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(f, f, _CMP_UNORD_Q));
  const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
}

inline void narrow(DType dtype, const float* from, void* to, int64_t count) {
  uint16_t* out = static_cast<uint16_t*>(to);
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    const __m256 f = _mm256_loadu_ps(from + i);
    const __m128i h = dtype == DType::kBFloat16 ? bfloat16_from(f) : _mm256_cvtps_ph(f, _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), h);
  }
  narrow_each(dtype, from + i, out + i, count - i);
}

}  // namespace
}  // namespace mnv2
