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

// Output columns [column, last) of one vector of channels, `TC` at a time: every loaded column feeds all the outputs
// that it touches.
template <int K, int S, int TC>
void depthwise_tile(const DepthwiseArgs& t, const float* weights, int64_t vector, int64_t column, int64_t last) {
  constexpr int L = Vec::kLanes;
  constexpr int kColumns = (TC - 1) * S + K;
  const Vec bias = Vec::load(weights);
  const Vec lo = Vec::broadcast(t.lo), hi = Vec::broadcast(t.hi);
  for (; column < last; column += TC) {
    Vec acc[TC];
#pragma GCC unroll 16
    for (int o = 0; o < TC; ++o) acc[o] = bias;
#pragma GCC unroll 8
    for (int ky = 0; ky < K; ++ky) {
      const float* row = t.rows[ky] + column * S * kChunk + vector * L;
      Vec tap[K];
#pragma GCC unroll 8
      for (int kx = 0; kx < K; ++kx) tap[kx] = Vec::load(weights + (1 + ky * K + kx) * L);
#pragma GCC unroll 32
      for (int j = 0; j < kColumns; ++j) {
        const Vec x = Vec::load(row + j * kChunk);
#pragma GCC unroll 8
        for (int kx = 0; kx < K; ++kx) {
          if (j >= kx && (j - kx) % S == 0 && (j - kx) / S < TC) acc[(j - kx) / S] = fma(x, tap[kx], acc[(j - kx) / S]);
        }
      }
    }
#pragma GCC unroll 16
    for (int o = 0; o < TC; ++o) clamp(acc[o], lo, hi).store(t.out + (column + o) * kChunk + vector * L);
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

using DepthwiseTile = void (*)(const DepthwiseArgs&, const float*, int64_t, int64_t, int64_t);

template <int K, int S>
struct DepthwiseTiles {
  static constexpr DepthwiseTile kTable[kMostColumns + 1] = {
      nullptr,
      &depthwise_tile<K, S, 1>,
      &depthwise_tile<K, S, 2>,
      &depthwise_tile<K, S, 3>,
      &depthwise_tile<K, S, 4>,
      &depthwise_tile<K, S, 5>,
      &depthwise_tile<K, S, 6>,
      &depthwise_tile<K, S, 7>,
  };
};

void depthwise_row(const DepthwiseArgs& t) {
  const DepthwiseTile* tiles = nullptr;
  if (t.kernel == 3 && t.dilation == 1 && t.stride == 1) tiles = DepthwiseTiles<3, 1>::kTable;
  if (t.kernel == 3 && t.dilation == 1 && t.stride == 2) tiles = DepthwiseTiles<3, 2>::kTable;
  const int64_t count = divide_up(t.w_out, kMostColumns);
  const int64_t vector_weights = (1 + t.kernel * t.kernel) * Vec::kLanes;
  // Tiles of two widths that differ by one cover the row: first the wider ones.
  const int64_t narrow = t.w_out / count, wide = (narrow + 1) * (t.w_out % count);
  for (int64_t v = 0; v < t.vectors; ++v) {
    const float* weights = t.weights + v * vector_weights;
    if (!tiles) {
      depthwise_any(t, weights, v, 0, t.w_out);
      continue;
    }
    if (wide > 0) tiles[narrow + 1](t, weights, v, 0, wide);
    tiles[narrow](t, weights, v, wide, t.w_out);
  }
}

}  // namespace
}  // namespace mnv2
