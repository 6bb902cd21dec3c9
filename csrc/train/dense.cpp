#include "dense.h"

namespace mnv2::train {
namespace {

Map windows_of(Passes& passes, const Dense& dense, const Input& x) {
  if (dense.is_pointwise()) return {x.data, dense.pixels(), dense.window()};
  const Data windows = passes.workspace(Slot::kHidden, dense.pixels() * dense.window());
  passes.windows(dense.shape, x.data, x.strides, windows);
  return {windows, dense.pixels(), dense.window()};
}

Matrix matrix_of(Passes& passes, const Dense& dense) {
  const Matrix matrix{dense.conv.weight, dense.shape.c_out, dense.window()};
  if (dense.shape.kernel == 1) return matrix;
  const Data permuted = passes.workspace(Slot::kMatrix, matrix.rows * matrix.columns);
  passes.window_matrix(dense.shape, dense.conv.weight, false, permuted);
  return {permuted, matrix.rows, matrix.columns};
}

// The same as a dense convolution.
DenseShape dense_of_windows(const Dense& dense) {
  DenseShape s = dense.shape;
  s.h = h_out(dense.shape), s.w = w_out(dense.shape);
  s.c_in = dense.window();
  s.kernel = s.stride = 1;
  s.pad = {};
  return s;
}

}  // namespace

int64_t DenseState::size(const Dense& dense) {
  const int64_t window = dense.window();
  return BatchNorm::kVectors * dense.shape.c_out + (dense.uses_moments() ? window * (1 + window) : 0) + 1;
}

DenseState DenseState::in(double* memory, const Dense& dense) {
  const auto take = [&memory](int64_t size) { return (memory += size) - size; };
  DenseState state{};
  state.windows.count = take(1);
  state.norm = BatchNorm::in(take(BatchNorm::kVectors * dense.shape.c_out), dense.shape.c_out);
  if (dense.uses_moments()) {
    state.windows.mean = take(dense.window());
    state.windows.products = take(dense.window() * dense.window());
  }
  return state;
}

void dense_forward(Passes& passes, const Dense& dense, const Input& x, const SumOverProcesses& sum, Data y,
                   const DenseState& state) {
  passes.fill(1, 0., state.windows.count);
  if (dense.by_channels) {
    return passes.linear_by_channels(dense.of_windows(), x.data, dense.conv.weight, dense.conv, state.norm, y);
  }
  if (!dense.conv.batch) {
    fixed_norm(passes, dense.conv, dense.shape.c_out, state.norm);
  } else {
    const Map windows = windows_of(passes, dense, x);
    const Matrix matrix = matrix_of(passes, dense);
    const bool centred = linear_norm(passes, dense.conv, matrix, windows, sum, state.windows, state.norm);
    if (centred) {
      const DenseShape s = dense_of_windows(dense);
      const Map input = centre(passes, windows, state.windows.mean, Slot::kHidden);
      const int64_t strides[] = {s.h * s.w * s.c_in, 1, s.w * s.c_in, s.c_in};
      return passes.dense(s, input.data, strides, matrix.data, state.norm.scale, state.norm.beta, y);
    }
  }
  passes.dense(dense.shape, x.data, x.strides, dense.conv.weight, state.norm.scale, state.norm.shift, y);
}

void dense_backward(Passes& passes, const Dense& dense, ConstData dy, const Input& x, const DenseState& state,
                    const Needs& needs, const SumOverProcesses& sum, const DenseGradients& gradients) {
  if (dense.by_channels) {
    const int64_t rows = dense.shape.c_out;
    const ChannelGradients found{.project = {},
                                 .d_depthwise = nullptr,
                                 .d_expand = needs.weight ? gradients.conv.d_weight : nullptr,
                                 .expand = {passes.vector(rows), passes.vector(rows)},
                                 .d_x = gradients.d_x,
                                 .residual = nullptr};
    passes.linear_backward_by_channels(dense.of_windows(), x.data, dy, dense.conv.weight, state.norm, found);
    return finish_norm(passes, rows, state.norm, found.expand, gradients.conv);
  }
  Map windows = windows_of(passes, dense, x);
  const Matrix matrix = matrix_of(passes, dense);
  const double* shift = state.norm.shift;
  if (dense.conv.batch) {
    windows = centre(passes, windows, state.windows.mean, Slot::kHidden);
    shift = state.norm.beta;
  }
  const bool permutes = dense.shape.kernel > 1, pointwise = dense.is_pointwise();
  const int64_t elements = matrix.rows * matrix.columns;
  const LinearGradients found{.d_x = !gradients.d_x ? nullptr
                                     : pointwise    ? gradients.d_x
                                                 : passes.workspace(Slot::kDHidden, windows.pixels * windows.channels),
                              .d_folded = passes.workspace(Slot::kGradient, elements),
                              .sum_dy = passes.vector(matrix.rows),
                              .sum_dy_linear = passes.vector(matrix.rows)};
  passes.linear_backward(dense.of_windows(), windows.data, dy, matrix.data, state.norm.scale, shift, found);
  ConvGradients to = gradients.conv;
  if (!needs.weight) to.d_weight = nullptr;
  if (to.d_weight && permutes) to.d_weight = found.d_folded;
  linear_backward(passes, dense.conv, matrix, state.norm, found, windows, state.windows, nullptr, sum, to);
  if (to.d_weight && permutes) passes.window_matrix(dense.shape, to.d_weight, true, gradients.conv.d_weight);
  if (gradients.d_x && !pointwise) passes.add_windows(dense.shape, found.d_x, gradients.d_x);
}

}  // namespace mnv2::train
