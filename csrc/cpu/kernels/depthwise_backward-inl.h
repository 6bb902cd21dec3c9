// Gradients of the depthwise convolution for one row of its input. Included once per ISA.
#pragma once

#include "depthwise-inl.h"

namespace mnv2 {
namespace {

struct DepthwiseBackwardArgs {
  const float* const* rows;  // for each ky the row of the output's gradient that reads this row through it, zeros if
                             // none does; from column 0, a pixel is kChunk floats
  int64_t first_ky;          // without dilation, every stride-th ky from here on reads this row, no other
  float* a;                  // (w, kChunk): the input row; becomes its gradient
  const float* weights;      // per vector: bias, then kernel * kernel taps
  float* d_weight;           // (kernel * kernel, kChunk): the filter's gradient is added
  float* sum_dx;             // (kChunk): the sum of the input's gradient is added
  const float* shift;        // per vector: the bias in the input, if there is a mask
  float* sum_dx_linear;      // (kChunk): the sum of the gradient times (input - shift) is added, if there is a mask
  int64_t w, w_out, vectors;
  int64_t kernel, stride, dilation, pad_left;
  bool mask;  // the gradient is 0 unless lo < a < hi
  float lo, hi;
};

// Sums over columns of one vector of channels.
struct ColumnSums {
  Vec dx, linear, lo, hi;
  const float* shift;

  ColumnSums(const DepthwiseBackwardArgs& t, int64_t v)
      : dx(Vec::load(t.sum_dx + v * Vec::kLanes)),
        linear(Vec::load(t.sum_dx_linear + v * Vec::kLanes)),
        lo(Vec::broadcast(t.lo)),
        hi(Vec::broadcast(t.hi)),
        shift(t.shift + v * Vec::kLanes) {}

  // `a` (kLanes), the input, becomes `gradient`.
  void finish(const DepthwiseBackwardArgs& t, float* a, Vec gradient) {
    if (t.mask) {
      const Vec input = Vec::load(a);
      gradient = inside(input, lo, hi, gradient);
      linear = fma(gradient, sub(input, Vec::load(shift)), linear);
    }
    dx = add(dx, gradient);
    gradient.store(a);
  }

  void store(const DepthwiseBackwardArgs& t, int64_t v) const {
    dx.store(t.sum_dx + v * Vec::kLanes);
    linear.store(t.sum_dx_linear + v * Vec::kLanes);
  }
};

// Columns [column, last) in tiles of `TC`, through every S-th ky from `KY` on: the others do not read this row.
// (column + pad_left) % S is E. The filter's gradient stays in registers meanwhile.
template <int K, int S, int KY, int E, int TC>
void depthwise_backward_tiles(const DepthwiseBackwardArgs& t, int64_t v, int64_t column, int64_t last) {
  constexpr int L = Vec::kLanes, kRows = (K - KY + S - 1) / S;
  // Column c = S * q + kx - E feeds output q through kx, q counted from q0.
  constexpr int kFirst = (E - K + 1) / S, kLast = (E + TC - 1) / S;  // the first is rounded up, being negative
  const float* weights = t.weights + v * (1 + K * K) * L + L;
  Vec w[kRows][K], d_weight[kRows][K];
  const float* rows[kRows];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
    rows[i] = t.rows[KY + i * S] + v * L;
#pragma GCC unroll 8
    for (int kx = 0; kx < K; ++kx) {
      w[i][kx] = Vec::load(weights + ((KY + i * S) * K + kx) * L);
      d_weight[i][kx] = Vec::load(t.d_weight + ((KY + i * S) * K + kx) * kChunk + v * L);
    }
  }
  ColumnSums sums(t, v);
  for (; column < last; column += TC) {
    const int64_t q0 = (column + t.pad_left - E) / S;
    float* a = t.a + column * kChunk + v * L;
    Vec acc[TC];
#pragma GCC unroll 8
    for (int c = 0; c < TC; ++c) acc[c] = Vec::zero();
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 16
      for (int q = kFirst; q <= kLast; ++q) {
        const Vec d = Vec::load(rows[i] + (q0 + q) * kChunk);
#pragma GCC unroll 8
        for (int kx = 0; kx < K; ++kx) {
          const int c = q * S + kx - E;
          if (c >= 0 && c < TC) {
            acc[c] = fma(d, w[i][kx], acc[c]);
            d_weight[i][kx] = fma(d, Vec::load(a + c * kChunk), d_weight[i][kx]);
          }
        }
      }
    }
#pragma GCC unroll 8
    for (int c = 0; c < TC; ++c) sums.finish(t, a + c * kChunk, acc[c]);
  }
  sums.store(t, v);
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int kx = 0; kx < K; ++kx) d_weight[i][kx].store(t.d_weight + ((KY + i * S) * K + kx) * kChunk + v * L);
  }
}

// Any kernel, stride and dilation.
void depthwise_backward_any(const DepthwiseBackwardArgs& t, int64_t v) {
  constexpr int L = Vec::kLanes;
  const float* weights = t.weights + v * (1 + t.kernel * t.kernel) * L + L;
  ColumnSums sums(t, v);
  for (int64_t column = 0; column < t.w; ++column) {
    float* a = t.a + column * kChunk + v * L;
    Vec acc = Vec::zero();
    for (int64_t ky = 0; ky < t.kernel; ++ky) {
      for (int64_t kx = 0; kx < t.kernel; ++kx) {
        const int64_t at = column + t.pad_left - kx * t.dilation;
        if (at < 0 || at % t.stride != 0 || at / t.stride >= t.w_out) continue;
        const Vec d = Vec::load(t.rows[ky] + at / t.stride * kChunk + v * L);
        const int64_t tap = ky * t.kernel + kx;
        float* d_weight = t.d_weight + tap * kChunk + v * L;
        acc = fma(d, Vec::load(weights + tap * L), acc);
        fma(d, Vec::load(a), Vec::load(d_weight)).store(d_weight);
      }
    }
    sums.finish(t, a, acc);
  }
  sums.store(t, v);
}

using DepthwiseBackwardTiles = void (*)(const DepthwiseBackwardArgs&, int64_t v, int64_t column, int64_t last);

// For stride S: by the first ky that reads the row and the parity of the first column.
template <int S, int KY, int E>
void depthwise_backward_columns(const DepthwiseBackwardArgs& t, int64_t v) {
  constexpr int kColumns = 4;  // even: the parity of a tile's first column stays the same
  constexpr DepthwiseBackwardTiles kRest[kColumns] = {
      nullptr,
      &depthwise_backward_tiles<3, S, KY, E, 1>,
      &depthwise_backward_tiles<3, S, KY, E, 2>,
      &depthwise_backward_tiles<3, S, KY, E, 3>,
  };
  const int64_t whole = t.w / kColumns * kColumns;
  depthwise_backward_tiles<3, S, KY, E, kColumns>(t, v, 0, whole);
  if (whole < t.w) kRest[t.w - whole](t, v, whole, t.w);
}

void depthwise_backward_row(const DepthwiseBackwardArgs& t) {
  void (*columns)(const DepthwiseBackwardArgs&, int64_t) = &depthwise_backward_any;
  if (t.kernel == 3 && t.dilation == 1 && t.stride == 1) columns = &depthwise_backward_columns<1, 0, 0>;
  if (t.kernel == 3 && t.dilation == 1 && t.stride == 2) {
    constexpr decltype(columns) kTable[2][2] = {
        {&depthwise_backward_columns<2, 0, 0>, &depthwise_backward_columns<2, 0, 1>},
        {&depthwise_backward_columns<2, 1, 0>, &depthwise_backward_columns<2, 1, 1>},
    };
    columns = kTable[t.first_ky][t.pad_left % 2];
  }
  for (int64_t v = 0; v < t.vectors; ++v) columns(t, v);
}

}  // namespace
}  // namespace mnv2
