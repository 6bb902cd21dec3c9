// A dense convolution with batch norm and clamp in training: a linear map of its windows.
#pragma once

#include "linear.h"

namespace mnv2::train {

struct Dense {
  DenseShape shape;
  Conv conv;
  bool by_channels;  // a pointwise convolution as a block's expansion by itself; see Passes

  int64_t pixels() const { return shape.n * h_out(shape) * w_out(shape); }
  int64_t window() const { return shape.kernel * shape.kernel * shape.c_in; }
  bool uses_moments() const { return conv.batch && !by_channels; }
  // The convolution of windows.
  BlockShape of_windows() const {
    return linear_block({shape.n, h_out(shape), w_out(shape), window()}, shape.c_out, shape.act);
  }
  bool is_pointwise() const { return shape.kernel == 1 && shape.stride == 1 && shape.pad == Padding{}; }
};

// As BlockState.
struct DenseState {
  BatchNorm norm;
  Moments windows;  // mean, products: null unless the convolution uses moments

  static int64_t size(const Dense& dense);
  static DenseState in(double* memory, const Dense& dense);
};

// x in any layout if it is read where it lies, see Passes::windows(); strides of n, c, h, w.
struct Input {
  ConstData data;
  int64_t strides[4];
};

// A pointwise convolution needs a dense x.
void dense_forward(Passes& passes, const Dense& dense, const Input& x, const SumOverProcesses& sum, Data y,
                   const DenseState& state);

struct DenseGradients {
  Data d_x;  // null if not wanted
  ConvGradients conv;
};

void dense_backward(Passes& passes, const Dense& dense, ConstData dy, const Input& x, const DenseState& state,
                    const Needs& needs, const SumOverProcesses& sum, const DenseGradients& gradients);

}  // namespace mnv2::train
