#include "passes.h"

#include <algorithm>

namespace mnv2::train {

void Passes::norm(const Conv& conv, int64_t channels, const double* mean, const double* squares, double count,
                  const BatchNorm& norm) {
  for (int64_t i = 0; i < channels; ++i) {
    set_norm(norm, i, conv.gamma ? conv.gamma[i] : 1., conv.beta ? conv.beta[i] : 0., mean[i], squares[i], count,
             conv.eps);
  }
}

void Passes::norm_backward(const BatchNorm& norm, int64_t channels, const double* sum_dy, const double* sum_dy_centred,
                           double count, const BatchNormBackward& backward) {
  for (int64_t i = 0; i < channels; ++i) {
    if (sum_dy) {
      train::set_backward(backward, i, norm, sum_dy[i], sum_dy_centred[i], count);
    } else {
      train::set_backward(backward, i, norm);
    }
  }
}

void Passes::multiply(int64_t size, const double* a, const double* b, double* out) {
  for (int64_t i = 0; i < size; ++i) out[i] = b ? a[i] * b[i] : a[i];
}

void Passes::fill(int64_t size, double value, double* out) { std::fill_n(out, size, value); }

double Passes::load(const double* from) { return *from; }

void Passes::to_sums(double count, int64_t channels, bool products, const double* mean, const double* squares,
                     double* sums) {
  *sums++ = count;
  for (int64_t i = 0; i < channels; ++i) *sums++ = mean[i] * count;
  for (int64_t i = 0; i < channels; ++i) {
    for (int64_t j = products ? 0 : i; j < (products ? channels : i + 1); ++j) {
      *sums++ = *squares++ + mean[i] * mean[j] * count;
    }
  }
}

double Passes::from_sums(int64_t channels, bool products, const double* sums, double* mean, double* squares) {
  const double count = *sums++;
  for (int64_t i = 0; i < channels; ++i) mean[i] = *sums++ / count;
  for (int64_t i = 0; i < channels; ++i) {
    for (int64_t j = products ? 0 : i; j < (products ? channels : i + 1); ++j) {
      const double centred = *sums++ - mean[i] * mean[j] * count;
      *squares++ = products ? centred : std::max(centred, 0.);
    }
  }
  return count;
}

}  // namespace mnv2::train
