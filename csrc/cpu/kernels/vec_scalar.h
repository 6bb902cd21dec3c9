// Vec of four floats in portable C++: always right, on any processor.
#pragma once

#include <cstring>

#include "storage.h"

namespace mnv2 {
namespace {

struct Vec {
  static constexpr int kLanes = 4;
  static constexpr int kPanel = 2;                     // vectors in a panel
  static constexpr int kRows[kPanel + 1] = {0, 6, 4};  // rows of a tile, by vectors: what the registers hold
  float v[kLanes];

  static Vec load(const float* p) {
    Vec r;
    std::memcpy(r.v, p, sizeof(r.v));
    return r;
  }
  static Vec load_first(const float* p, int count) {
    Vec r = zero();
    for (int i = 0; i < count; ++i) r.v[i] = p[i];
    return r;
  }
  static Vec broadcast(float x) {
    Vec r;
    for (float& e : r.v) e = x;
    return r;
  }
  static Vec zero() { return broadcast(0.f); }
  void store(float* p) const { std::memcpy(p, v, sizeof(v)); }
  void store_first(float* p, int count) const {
    for (int i = 0; i < count; ++i) p[i] = v[i];
  }
};

inline Vec fma(Vec a, Vec b, Vec c) {
  for (int i = 0; i < Vec::kLanes; ++i) c.v[i] = a.v[i] * b.v[i] + c.v[i];
  return c;
}
inline Vec add(Vec a, Vec b) {
  for (int i = 0; i < Vec::kLanes; ++i) a.v[i] += b.v[i];
  return a;
}
inline Vec mul(Vec a, Vec b) {
  for (int i = 0; i < Vec::kLanes; ++i) a.v[i] *= b.v[i];
  return a;
}
// NaN in x comes through, as in PyTorch's clamp.
inline Vec clamp(Vec x, Vec lo, Vec hi) {
  for (int i = 0; i < Vec::kLanes; ++i) {
    x.v[i] = x.v[i] < lo.v[i] ? lo.v[i] : x.v[i];
    x.v[i] = x.v[i] > hi.v[i] ? hi.v[i] : x.v[i];
  }
  return x;
}

inline void widen(DType dtype, const void* from, float* to, int64_t count) { widen_each(dtype, from, to, count); }
inline void narrow(DType dtype, const float* from, void* to, int64_t count) { narrow_each(dtype, from, to, count); }

}  // namespace
}  // namespace mnv2
