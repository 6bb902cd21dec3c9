// Vec of four floats in the compilers' portable vector type, for any processor.
#pragma once

#include <cstring>

#include "convert.h"

namespace mnv2 {
namespace {

struct Vec {
  static constexpr int kLanes = 4;
  static constexpr int kPanel = 2;                     // vectors in a panel
  static constexpr int kRows[kPanel + 1] = {0, 6, 4};  // rows of a tile, by vectors: 16 registers
  typedef float Floats __attribute__((vector_size(16)));
  Floats v;
  static constexpr int kLowLanes = 0;  // there is no cheaper half

  static Vec load(const float* p) {
    Vec r;
    std::memcpy(&r.v, p, sizeof(r.v));
    return r;
  }
  static Vec load_first(const float* p, int count) {
    Vec r = zero();
    for (int i = 0; i < count; ++i) r.v[i] = p[i];
    return r;
  }
  static Vec broadcast(float x) { return {Floats{x, x, x, x}}; }
  static Vec zero() { return broadcast(0.f); }
  void store(float* p) const { std::memcpy(p, &v, sizeof(v)); }
  void stream(float* p) const { store(p); }  // there is no portable store past the caches
  void store_first(float* p, int count) const {
    for (int i = 0; i < count; ++i) p[i] = v[i];
  }
};

inline void keep(Vec&) {}
inline void end_of_streams() {}
inline Vec fma(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }
inline Vec fma_low(const float* a, Vec b, Vec c) { return fma(Vec::broadcast(*a), b, c); }
inline Vec add(Vec a, Vec b) { return {a.v + b.v}; }
inline Vec sub(Vec a, Vec b) { return {a.v - b.v}; }
inline Vec mul(Vec a, Vec b) { return {a.v * b.v}; }
// NaN in x comes through, as in PyTorch's clamp.
inline Vec clamp(Vec x, Vec lo, Vec hi) {
  x.v = x.v < lo.v ? lo.v : x.v;
  x.v = x.v > hi.v ? hi.v : x.v;
  return x;
}

// By lanes: v if lo < x < hi, else 0.
inline Vec inside(Vec x, Vec lo, Vec hi, Vec v) {
  const Vec::Floats zero{};
  v.v = x.v > lo.v ? v.v : zero;
  v.v = x.v < hi.v ? v.v : zero;
  return v;
}

inline void widen(DType dtype, const void* from, float* to, int64_t count) { widen_each(dtype, from, to, count); }
inline void narrow(DType dtype, const float* from, void* to, int64_t count) { narrow_each(dtype, from, to, count); }

}  // namespace
}  // namespace mnv2
