// Conversions between storage types and fp32, one element at a time. Internal linkage: ISA files include it.
#pragma once

#include <cstdint>
#include <cstring>

#include "../../../shapes.h"

namespace mnv2 {
namespace {

inline float float_from_bits(uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline uint32_t bits_of(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  return bits;
}

inline float from_bfloat16(uint16_t h) { return float_from_bits(uint32_t{h} << 16); }

// Round to nearest, ties to even; NaN stays NaN.
inline uint16_t to_bfloat16(float f) {
  const uint32_t bits = bits_of(f);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// Integer arithmetic alone: while denormals are flushed, half's subnormal numbers must not be.
inline float from_float16(uint16_t h) {
  const uint32_t sign = uint32_t{h & 0x8000u} << 16;
  uint32_t exponent = (h >> 10) & 0x1fu, mantissa = h & 0x3ffu;
  if (exponent == 0x1f) return float_from_bits(sign | 0x7f800000u | (mantissa << 13));
  if (exponent == 0) {
    if (mantissa == 0) return float_from_bits(sign);
    exponent = 1;
    while (!(mantissa & 0x400u)) mantissa <<= 1, --exponent;
    mantissa &= 0x3ffu;
  }
  return float_from_bits(sign | ((exponent + 112) << 23) | (mantissa << 13));
}

inline uint16_t to_float16(float f) {
  const uint32_t bits = bits_of(f), magnitude = bits & 0x7fffffffu;
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // rounds to 65536 and above
  if (magnitude < 0x33000000u) return sign;                                    // at most half of the smallest
  const int exponent = static_cast<int>(magnitude >> 23) - 112;
  uint32_t mantissa = (magnitude & 0x7fffffu) | 0x800000u;
  const int shift = exponent > 0 ? 13 : 14 - exponent;
  const uint32_t half = 1u << (shift - 1), rest = mantissa & ((1u << shift) - 1u);
  mantissa >>= shift;
  if (rest > half || (rest == half && (mantissa & 1u))) ++mantissa;
  return static_cast<uint16_t>(sign |
                               (exponent > 0 ? (static_cast<uint32_t>(exponent - 1) << 10) + mantissa : mantissa));
}

inline float load_element(DType dtype, const void* from, int64_t i) {
  if (dtype == DType::kFloat32) return static_cast<const float*>(from)[i];
  const uint16_t h = static_cast<const uint16_t*>(from)[i];
  return dtype == DType::kBFloat16 ? from_bfloat16(h) : from_float16(h);
}

inline void widen_each(DType dtype, const void* from, float* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = load_element(dtype, from, i);
}

inline void narrow_each(DType dtype, const float* from, void* to, int64_t count) {
  uint16_t* out = static_cast<uint16_t*>(to);
  if (dtype == DType::kBFloat16) {
    for (int64_t i = 0; i < count; ++i) out[i] = to_bfloat16(from[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) out[i] = to_float16(from[i]);
  }
}

}  // namespace
}  // namespace mnv2
