// The rate that bounds every kernel here: fused multiply-adds on registers alone. Included once per ISA.
#pragma once

namespace mnv2 {
namespace {

constexpr int kChains = 12;  // independent, to cover the latency of 4 cycles on 2 units with some to spare

// Runs iterations * kChains * lanes multiply-adds and writes kLanes floats that depend on all of them.
void multiply_add(int64_t iterations, float* out) {
  Vec acc[kChains];
#pragma GCC unroll 16
  for (int c = 0; c < kChains; ++c) acc[c] = Vec::broadcast(static_cast<float>(c));
  Vec a = Vec::broadcast(0.999f);
  const Vec b = Vec::broadcast(1e-3f);
  for (int64_t i = 0; i < iterations; ++i) {
#pragma GCC unroll 16
    for (int c = 0; c < kChains; ++c) acc[c] = fma(acc[c], a, b);
  }
#pragma GCC unroll 16
  for (int c = 1; c < kChains; ++c) acc[0] = add(acc[0], acc[c]);
  acc[0].store(out);
}

}  // namespace
}  // namespace mnv2
