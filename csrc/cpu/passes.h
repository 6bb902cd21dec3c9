// The passes of training, each a stage or two. Sums over pixels are formed part by part and then added up in order, so
// that they do not depend on the number of threads. Torch-free; maps are fp32 and dense in the order n, h, w, c.
#pragma once

#include "kernels/table.h"
#include "stages.h"

namespace mnv2 {

struct Passes {
  const KernelTable& kernels;
  Machine machine;
  const ParallelFor& parallel;

  // x (pixels, channels): the channels' mean and (channels, channels) sums of centred products, which are products in
  // fp64 if `exact`.
  void moments(int64_t pixels, int64_t channels, const float* x, bool exact, double* mean, double* products) const;
  // weight (rows, channels) times x: mean and sum of centred squares (rows), from x's moments. uncorrelated (rows): the
  // squares if x's channels were uncorrelated.
  void linear_moments(int64_t rows, int64_t channels, const float* weight, const double* mean, const double* products,
                      double* out_mean, double* out_squares, double* uncorrelated) const;
  // out (rows, columns) = a' b of a (k, rows) and b (k, columns).
  void product(int64_t k, int64_t rows, int64_t columns, const float* a, const float* b, float* out) const;
  // out (rows, columns) = a with every row scaled; may be a. sums (rows): a * b summed over the columns; or null.
  void scale_rows(int64_t rows, int64_t columns, const float* a, const double* scale, float* out, const float* b,
                  double* sums) const;
  // x (pixels, channels): the channels' mean and sum of centred squares.
  void map_moments(int64_t pixels, int64_t channels, const float* x, double* mean, double* squares) const;
  // Sums over the pixels of dy, and of dy * (x - mean).
  void map_products(int64_t pixels, int64_t channels, const float* dy, const float* x, const float* mean,
                    double* sum_dy, double* sum_dy_centred) const;
  // See KernelTable; uses channels, a, b, c, scale, shift and out.
  void map_combine(int64_t pixels, MapTask task) const;
  // matrix (channels, channels), vector (channels): see InputGradientTask.
  void input_backward(int64_t pixels, InputGradientTask task, const float* matrix, const double* vector) const;
  // The dense convolution's windows: out (n, h_out, w_out, kernel * kernel * c_in), from x in any layout.
  void windows(const DenseShape& shape, const float* x, const int64_t strides[4], float* out) const;

  // The passes over hidden channels. They use the maps, weights and vectors of the task; sums are (c_hidden) each.
  void hidden(const BlockShape& shape, TrainTask task, double* mean, double* squares) const;
  void project(const BlockShape& shape, TrainTask task) const;
  // d_project_weight (c_out, c_hidden) or null; sums of d_hidden, and of d_hidden * (hidden - mean).
  void project_backward(const BlockShape& shape, TrainTask task, float* d_project_weight, double* sum_dy,
                        double* sum_dy_centred) const;
  // Outputs of hidden_backward(), null if not wanted; see TrainTask.
  struct Gradients {
    float* d_depthwise_weight;  // (c_hidden, kernel * kernel)
    float* d_expand_weight;     // (c_hidden, c_in)
    double* sum_d_expand;       // never null, nor is the next
    double* sum_d_expand_linear;
    bool with_projection;  // computes the outputs of project_backward() in the same pass:
    float* d_project_weight;
    double *sum_dy, *sum_dy_centred;
  };
  void hidden_backward(const BlockShape& shape, TrainTask task, const Gradients& gradients) const;
};

}  // namespace mnv2
