// Runs of floats that need not be whole vectors, and scratch memory. Included once per ISA.
#pragma once

#include "../layout.h"

namespace mnv2 {
namespace {

constexpr Lanes kLanes{Vec::kLanes, Vec::kPanel};

// The first `lanes` floats at p; the other lanes are zero.
inline Vec load_lanes(const float* p, int lanes) {
  return lanes == Vec::kLanes ? Vec::load(p) : Vec::load_first(p, lanes);
}
inline void store_lanes(Vec v, float* p, int lanes) {
  if (lanes == Vec::kLanes) return v.store(p);
  v.store_first(p, lanes);
}

// Lanes of the vector at `first` that lie before `end`.
inline int lanes_from(int64_t first, int64_t end) {
  return static_cast<int>(end - first < Vec::kLanes ? end - first : Vec::kLanes);
}

void clear(float* p, int64_t count) {
  for (int64_t i = 0; i < count; ++i) p[i] = 0.f;
}

// Of whole vectors.
void copy(const float* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; i += Vec::kLanes) Vec::load(from + i).store(to + i);
}

// Cuts a task's scratch memory into buffers that begin at cache lines.
struct Buffers {
  float* free;

  float* take(int64_t floats) {
    float* taken = free;
    free += round_up(floats, kAlign);
    return taken;
  }
};

}  // namespace
}  // namespace mnv2
