// Depthwise convolution of one output row from rows of kChunk-wide pixels. Included once per ISA.
#pragma once

#include "lanes-inl.h"

namespace mnv2 {
namespace {

struct DepthwiseArgs {
  const float* const* rows;  // `kernel` expanded rows, zero columns included; a pixel is kChunk floats
  float* out;                // (w_out, kChunk)
  const float* weights;      // per vector: bias, then kernel * kernel taps
  int64_t w_out, vectors;
  int64_t kernel, stride, dilation;
  float lo, hi;
};

// Outputs [column, last) of one vector of channels, `TC` at a time: every loaded column feeds all the outputs that it
// touches. With a dilation D these are D columns apart, so a row is filtered in D phases: output i is column
// i * D + phase.
template <int K, int S, int D, int TC>
void depthwise_tile(const DepthwiseArgs& t, const float* weights, int64_t vector, int64_t phase, int64_t column,
                    int64_t last) {
  constexpr int L = Vec::kLanes;
  constexpr int kColumns = (TC - 1) * S + K;
  constexpr int kStep = D * kChunk;
  const int64_t first = phase * kChunk + vector * L;
  const Vec bias = Vec::load(weights);
  const Vec lo = Vec::broadcast(t.lo), hi = Vec::broadcast(t.hi);
  for (; column < last; column += TC) {
    Vec acc[TC];
#pragma GCC unroll 16
    for (int o = 0; o < TC; ++o) acc[o] = bias;
#pragma GCC unroll 8
    for (int ky = 0; ky < K; ++ky) {
      const float* row = t.rows[ky] + column * S * kStep + first;
      Vec tap[K];
#pragma GCC unroll 8
      for (int kx = 0; kx < K; ++kx) tap[kx] = Vec::load(weights + (1 + ky * K + kx) * L);
#pragma GCC unroll 32
      for (int j = 0; j < kColumns; ++j) {
        Vec x = Vec::load(row + j * kStep);
        keep(x);
#pragma GCC unroll 8
        for (int kx = 0; kx < K; ++kx) {
          if (j >= kx && (j - kx) % S == 0 && (j - kx) / S < TC) acc[(j - kx) / S] = fma(x, tap[kx], acc[(j - kx) / S]);
        }
      }
    }
#pragma GCC unroll 16
    for (int o = 0; o < TC; ++o) clamp(acc[o], lo, hi).store(t.out + (column + o) * kStep + first);
  }
}

// Any kernel, stride and dilation; sums in the same order as above.
void depthwise_any(const DepthwiseArgs& t, const float* weights, int64_t vector, int64_t column, int64_t columns) {
  constexpr int L = Vec::kLanes;
  const Vec lo = Vec::broadcast(t.lo), hi = Vec::broadcast(t.hi);
  for (int64_t o = column; o < column + columns; ++o) {
    Vec acc = Vec::load(weights);
    for (int64_t ky = 0; ky < t.kernel; ++ky) {
      const float* row = t.rows[ky] + o * t.stride * kChunk + vector * L;
      for (int64_t kx = 0; kx < t.kernel; ++kx) {
        acc = fma(Vec::load(row + kx * t.dilation * kChunk), Vec::load(weights + (1 + ky * t.kernel + kx) * L), acc);
      }
    }
    clamp(acc, lo, hi).store(t.out + o * kChunk + vector * L);
  }
}

constexpr int kMostColumns = 7;  // divides the widths 7, 14, 28, 56 and 112 of a 224 input

using DepthwiseTile = void (*)(const DepthwiseArgs&, const float*, int64_t, int64_t, int64_t, int64_t);

template <int K, int S, int D>
struct DepthwiseTiles {
  static constexpr DepthwiseTile kTable[kMostColumns + 1] = {
      nullptr,
      &depthwise_tile<K, S, D, 1>,
      &depthwise_tile<K, S, D, 2>,
      &depthwise_tile<K, S, D, 3>,
      &depthwise_tile<K, S, D, 4>,
      &depthwise_tile<K, S, D, 5>,
      &depthwise_tile<K, S, D, 6>,
      &depthwise_tile<K, S, D, 7>,
  };
};

// Null if only depthwise_any() can do it.
const DepthwiseTile* depthwise_tiles(const DepthwiseArgs& t) {
  if (t.kernel != 3) return nullptr;
  if (t.stride == 2 && t.dilation == 1) return DepthwiseTiles<3, 2, 1>::kTable;
  if (t.stride != 1) return nullptr;
  switch (t.dilation) {
    case 1: return DepthwiseTiles<3, 1, 1>::kTable;
    case 2: return DepthwiseTiles<3, 1, 2>::kTable;
    case 4: return DepthwiseTiles<3, 1, 4>::kTable;
    default: return nullptr;
  }
}

void depthwise_row(const DepthwiseArgs& t) {
  const DepthwiseTile* tiles = depthwise_tiles(t);
  const int64_t vector_weights = (1 + t.kernel * t.kernel) * Vec::kLanes;
  if (!tiles) {
    for (int64_t v = 0; v < t.vectors; ++v) depthwise_any(t, t.weights + v * vector_weights, v, 0, t.w_out);
    return;
  }
  for (int64_t phase = 0; phase < t.dilation && phase < t.w_out; ++phase) {
    const int64_t outputs = divide_up(t.w_out - phase, t.dilation), count = divide_up(outputs, kMostColumns);
    // Tiles of two widths that differ by one cover the phase: first the wider ones.
    const int64_t narrow = outputs / count, wide = (narrow + 1) * (outputs % count);
    for (int64_t v = 0; v < t.vectors; ++v) {
      const float* weights = t.weights + v * vector_weights;
      if (wide > 0) tiles[narrow + 1](t, weights, v, phase, 0, wide);
      tiles[narrow](t, weights, v, phase, wide, outputs);
    }
  }
}

}  // namespace
}  // namespace mnv2
