// Vec of sixteen floats for AVX-512 (F, BW, DQ, VL).
#pragma once

#include <immintrin.h>

#include "convert.h"

namespace mnv2 {
namespace {

struct Vec {
  static constexpr int kLanes = 16;
  static constexpr int kPanel = 3;                          // vectors in a panel
  static constexpr int kRows[kPanel + 1] = {0, 14, 14, 9};  // rows of a tile, by vectors: 32 registers
  static constexpr int kLowLanes = 8;                       // covered by fma_low
  __m512 v;

  static __mmask16 first(int count) { return static_cast<__mmask16>((1u << count) - 1u); }
  static Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static Vec load_first(const float* p, int count) {
    if (is_low(count)) return {_mm512_zextps256_ps512(_mm256_loadu_ps(p))};
    return {_mm512_maskz_loadu_ps(first(count), p)};
  }
  static Vec broadcast(float x) { return {_mm512_set1_ps(x)}; }
  static Vec zero() { return {_mm512_setzero_ps()}; }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  // Past the caches; p is aligned to the vector.
  void stream(float* p) const { _mm512_stream_ps(p, v); }
  void store_first(float* p, int count) const {
    if (is_low(count)) return _mm256_storeu_ps(p, _mm512_castps512_ps256(v));
    _mm512_mask_storeu_ps(p, first(count), v);
  }

 private:
  // Half a vector takes no mask if the compiler knows it.
  static bool is_low(int count) { return __builtin_constant_p(count) && count == kLowLanes; }
};

// Keeps x in a register. The compiler would rather load it again for each of its uses.
inline void keep(Vec& x) { asm("" : "+v"(x.v)); }
inline void end_of_streams() { _mm_sfence(); }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// fma of *a on the lower half, at half the cost on processors that split 512 bits in two; the upper half becomes zero.
// Assembly, because GCC moves the accumulator twice around the intrinsics.
inline Vec fma_low(const float* a, Vec b, Vec c) {
  asm("vfmadd231ps %2%{1to8%}, %t1, %t0" : "+v"(c.v) : "v"(b.v), "m"(*a));
  return c;
}
inline Vec add(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec sub(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec mul(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
// min and max return their second operand if either is NaN: a NaN in x comes through, as in PyTorch's clamp.
inline Vec clamp(Vec x, Vec lo, Vec hi) { return {_mm512_min_ps(hi.v, _mm512_max_ps(lo.v, x.v))}; }

// By lanes: v if lo < x < hi, else 0.
inline Vec inside(Vec x, Vec lo, Vec hi, Vec v) {
  const __mmask16 above = _mm512_cmp_ps_mask(x.v, lo.v, _CMP_GT_OQ);
  return {_mm512_maskz_mov_ps(_mm512_mask_cmp_ps_mask(above, x.v, hi.v, _CMP_LT_OQ), v.v)};
}

inline void widen(DType dtype, const void* from, float* to, int64_t count) {
  const uint16_t* in = static_cast<const uint16_t*>(from);
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in + i));
    const __m512 f = dtype == DType::kBFloat16 ? _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))
                                               : _mm512_cvtph_ps(h);
    _mm512_storeu_ps(to + i, f);
  }
  widen_each(dtype, in + i, to + i, count - i);
}

inline __m256i bfloat16_from(__m512 f) {
  const __m512i bits = _mm512_castps_si512(f);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(f, f, _CMP_UNORD_Q);
  const __m512i quieted = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(quieted, 16));
}

inline void narrow(DType dtype, const float* from, void* to, int64_t count) {
  uint16_t* out = static_cast<uint16_t*>(to);
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    const __m512 f = _mm512_loadu_ps(from + i);
    const __m256i h = dtype == DType::kBFloat16 ? bfloat16_from(f) : _mm512_cvtps_ph(f, _MM_FROUND_TO_NEAREST_INT);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), h);
  }
  narrow_each(dtype, from + i, out + i, count - i);
}

}  // namespace
}  // namespace mnv2
