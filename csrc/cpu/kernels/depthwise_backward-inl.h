// Gradients of the depthwise convolution for one row of its input. Included once per ISA.
#pragma once

#include "depthwise-inl.h"

namespace mnv2 {
namespace {

struct DepthwiseBackwardArgs {
  const float* const* rows;  // per ky the row of the output's gradient that reads this row through it, or null; from
                             // column 0, a pixel is kChunk floats
  float* a;                  // (w, kChunk): the input row; becomes its gradient
  const float* weights;      // per vector: bias, then kernel * kernel taps
  float* dw;                 // (kernel * kernel, kChunk): the filter's gradient is added
  float* sum;                // (kChunk): the sum of the input's gradient is added
  int64_t w, w_out, vectors;
  int64_t kernel, stride, dilation, pad_left;
  bool mask;  // the gradient is 0 where not lo < a < hi
  float lo, hi;
};

inline void finish_column(const DepthwiseBackwardArgs& t, float* a, Vec gradient, Vec lo, Vec hi, Vec& sum) {
  if (t.mask) gradient = inside(Vec::load(a), lo, hi, gradient);
  sum = add(sum, gradient);
  gradient.store(a);
}

// `TC` neighbouring columns from `column` on, of which (column + pad_left) % S == E.
template <int K, int S, int E, int TC>
void depthwise_backward_tile(const DepthwiseBackwardArgs& t, int64_t v, int64_t column) {
  constexpr int L = Vec::kLanes;
  // Column c feeds output q through kx where c = S * q + kx - E, q counted from q0.
  constexpr int kFirst = (E - K + 1) / S, kLast = (E + TC - 1) / S;  // the first is rounded up, being negative
  const float* weights = t.weights + v * (1 + K * K) * L + L;
  const int64_t q0 = (column + t.pad_left - E) / S;
  float* a = t.a + column * kChunk + v * L;
  Vec acc[TC];
#pragma GCC unroll 8
  for (int c = 0; c < TC; ++c) acc[c] = Vec::zero();
  for (int ky = 0; ky < K; ++ky) {
    if (!t.rows[ky]) continue;
    const float* row = t.rows[ky] + q0 * kChunk + v * L;
    float* dw_at = t.dw + ky * K * kChunk + v * L;
    Vec w[K], dw[K];
#pragma GCC unroll 8
    for (int kx = 0; kx < K; ++kx) {
      w[kx] = Vec::load(weights + (ky * K + kx) * L);
      dw[kx] = Vec::load(dw_at + kx * kChunk);
    }
#pragma GCC unroll 16
    for (int q = kFirst; q <= kLast; ++q) {
      const Vec d = Vec::load(row + q * kChunk);
#pragma GCC unroll 8
      for (int kx = 0; kx < K; ++kx) {
        const int c = q * S + kx - E;
        if (c >= 0 && c < TC) {
          acc[c] = fma(d, w[kx], acc[c]);
          dw[kx] = fma(d, Vec::load(a + c * kChunk), dw[kx]);
        }
      }
    }
#pragma GCC unroll 8
    for (int kx = 0; kx < K; ++kx) dw[kx].store(dw_at + kx * kChunk);
  }
  const Vec lo = Vec::broadcast(t.lo), hi = Vec::broadcast(t.hi);
  Vec sum = Vec::load(t.sum + v * L);
#pragma GCC unroll 8
  for (int c = 0; c < TC; ++c) finish_column(t, a + c * kChunk, acc[c], lo, hi, sum);
  sum.store(t.sum + v * L);
}

// Any kernel, stride and dilation.
void depthwise_backward_any(const DepthwiseBackwardArgs& t, int64_t v) {
  constexpr int L = Vec::kLanes;
  const Vec lo = Vec::broadcast(t.lo), hi = Vec::broadcast(t.hi);
  const float* weights = t.weights + v * (1 + t.kernel * t.kernel) * L + L;
  Vec sum = Vec::load(t.sum + v * L);
  for (int64_t column = 0; column < t.w; ++column) {
    float* a = t.a + column * kChunk + v * L;
    Vec acc = Vec::zero();
    for (int64_t ky = 0; ky < t.kernel; ++ky) {
      if (!t.rows[ky]) continue;
      for (int64_t kx = 0; kx < t.kernel; ++kx) {
        const int64_t at = column + t.pad_left - kx * t.dilation;
        if (at < 0 || at % t.stride != 0 || at / t.stride >= t.w_out) continue;
        const Vec d = Vec::load(t.rows[ky] + at / t.stride * kChunk + v * L);
        const int64_t tap = ky * t.kernel + kx;
        float* dw = t.dw + tap * kChunk + v * L;
        acc = fma(d, Vec::load(weights + tap * L), acc);
        fma(d, Vec::load(a), Vec::load(dw)).store(dw);
      }
    }
    finish_column(t, a, acc, lo, hi, sum);
  }
  sum.store(t.sum + v * L);
}

using DepthwiseBackwardTile = void (*)(const DepthwiseBackwardArgs&, int64_t v, int64_t column);

constexpr int kMostGradientColumns = 6;  // even: the parity of a tile's first column stays the same

template <int S, int E>
struct DepthwiseBackwardTiles {
  static constexpr DepthwiseBackwardTile kTable[kMostGradientColumns + 1] = {
      nullptr,
      &depthwise_backward_tile<3, S, E, 1>,
      &depthwise_backward_tile<3, S, E, 2>,
      &depthwise_backward_tile<3, S, E, 3>,
      &depthwise_backward_tile<3, S, E, 4>,
      &depthwise_backward_tile<3, S, E, 5>,
      &depthwise_backward_tile<3, S, E, 6>,
  };
};

void depthwise_backward_row(const DepthwiseBackwardArgs& t) {
  const DepthwiseBackwardTile* tiles = nullptr;
  if (t.kernel == 3 && t.dilation == 1) {
    if (t.stride == 1) tiles = DepthwiseBackwardTiles<1, 0>::kTable;
    if (t.stride == 2 && t.pad_left % 2 == 0) tiles = DepthwiseBackwardTiles<2, 0>::kTable;
    if (t.stride == 2 && t.pad_left % 2 == 1) tiles = DepthwiseBackwardTiles<2, 1>::kTable;
  }
  for (int64_t v = 0; v < t.vectors; ++v) {
    if (!tiles) {
      depthwise_backward_any(t, v);
      continue;
    }
    int64_t column = 0;
    for (; column + kMostGradientColumns <= t.w; column += kMostGradientColumns) {
      tiles[kMostGradientColumns](t, v, column);
    }
    if (column < t.w) tiles[t.w - column](t, v, column);
  }
}

}  // namespace
}  // namespace mnv2
