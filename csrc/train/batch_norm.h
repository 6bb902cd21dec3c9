// A batch norm in training, as vectors over channels in float64; docs/training.md has the formulas. Torch-free: plain
// functions over plain memory.
#pragma once

#include <cmath>
#include <cstdint>

namespace mnv2::train {

// A batch norm with known statistics: output = scale * input + shift.
struct BatchNorm {
  double* scale;     // gamma * rstd
  double* shift;     // beta - mean * scale
  double* mean;      // of the input
  double* unbiased;  // variance, for running statistics
  double* rstd;      // 1 / sqrt(variance + eps)
  double* beta;

  static constexpr int64_t kVectors = 6;

  // From channel i on.
  BatchNorm of(int64_t i) const { return {scale + i, shift + i, mean + i, unbiased + i, rstd + i, beta + i}; }

  // In `memory`, kVectors * channels numbers. Null in null.
  static BatchNorm in(double* memory, int64_t channels) {
    const auto vector = [=](int64_t i) { return memory ? memory + i * channels : nullptr; };
    return {vector(0), vector(1), vector(2), vector(3), vector(4), vector(5)};
  }
};

// Its backward: d_input = d_output * (gradient of the output) + input * (input) + constant.
struct BatchNormBackward {
  double *d_output, *input, *constant;

  static constexpr int64_t kVectors = 3;

  static BatchNormBackward in(double* memory, int64_t channels) {
    return {memory, memory + channels, memory + 2 * channels};
  }
};

// The norm of channel i, of an input with this mean and sum of centred squares over `count` pixels.
inline void set_norm(const BatchNorm& norm, int64_t i, double gamma, double beta, double mean, double squares,
                     double count, double eps) {
  const double rstd = 1. / std::sqrt(squares / count + eps), scale = rstd * gamma;
  norm.scale[i] = scale;
  norm.shift[i] = beta - mean * scale;
  norm.mean[i] = mean;
  norm.unbiased[i] = squares / (count - 1.);
  norm.rstd[i] = rstd;
  norm.beta[i] = beta;
}

// The backward of channel i with the statistics of the batch, from the sums over all `count` pixels of the output's
// gradient, and of that times the centred input.
inline void set_backward(const BatchNormBackward& backward, int64_t i, const BatchNorm& norm, double sum_dy,
                         double sum_dy_centred, double count) {
  const double scale = norm.scale[i], rstd = norm.rstd[i];
  backward.d_output[i] = scale;
  backward.input[i] = scale * rstd * rstd * sum_dy_centred / -count;
  backward.constant[i] = scale * sum_dy / -count - backward.input[i] * norm.mean[i];
}

// The same with fixed statistics.
inline void set_backward(const BatchNormBackward& backward, int64_t i, const BatchNorm& norm) {
  backward.d_output[i] = norm.scale[i];
  backward.input[i] = backward.constant[i] = 0.;
}

// Above this ratio of uncorrelated to true centred squares, fp32 products are too coarse; see csrc/cpu/NOTES.md.
constexpr double kCancels = 8.;

// Above this ratio of beta to gamma the sum of dy * (scale z) has lost digits to beta.
constexpr double kFar = 8.;

// The gradient of gamma of channel i of a norm behind a linear map. product: the row's sum of d_folded * weight.
// sum_dy_linear: the sum of dy * (scale z), see Passes::linear_gradients().
inline double linear_d_gamma(const BatchNorm& norm, int64_t i, double product, double sum_dy, double sum_dy_linear,
                             bool batch) {
  if (!batch) return norm.rstd[i] * (product - norm.mean[i] * sum_dy);
  // The same from the values that the pass computed: their rounding cancels in the gradients, as in PyTorch's.
  if (std::abs(norm.beta[i]) * norm.rstd[i] < kFar * std::abs(norm.scale[i])) product = sum_dy_linear / norm.scale[i];
  return norm.rstd[i] * product;
}

}  // namespace mnv2::train
