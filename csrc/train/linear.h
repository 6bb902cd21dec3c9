// A linear map with a batch norm behind it: its statistics and gradients in closed form. docs/training.md derives them.
// Blocks and dense convolutions share this.
#pragma once

#include <functional>

#include "passes.h"

namespace mnv2::train {

// Sums vectors over the processes of synchronised batch norms, in place. Empty without such processes.
using SumOverProcesses = std::function<void(double* values, int64_t size)>;

// Of a convolution's input, over the pixels of all processes.
struct Moments {
  double* mean;      // (channels)
  double* products;  // (channels, channels): sums of products of the centred input
  double* count;     // pixels
};

// Which gradients of a `Conv` are wanted.
struct Needs {
  bool weight, gamma, beta;
  bool any() const { return weight || gamma || beta; }
};

// Gradients of a `Conv`. Those of gamma and beta are always written if they are computed on the way.
struct ConvGradients {
  Data d_weight;  // null if not wanted
  double *d_gamma, *d_beta;
};

// Joins mean and centred squares (channels), or products (channels, channels), of this process's `count` pixels with
// those of all processes. Returns the count of all.
double join_moments(Passes& passes, double count, int64_t channels, bool products, double* mean, double* squares,
                    const SumOverProcesses& sum);

// The same for the sums of a norm's backward: `from`, of this process, stays as it is.
NormSums join_sums(Passes& passes, int64_t channels, const NormSums& from, const SumOverProcesses& sum);

// The norm with the statistics of the batch behind `weight` times x, and the moments of x. Returns whether the forward
// must use the centred x, as the backward does: if not, the two round differently.
bool linear_norm(Passes& passes, const Conv& conv, const Matrix& weight, const Map& x, const SumOverProcesses& sum,
                 const Moments& moments, const BatchNorm& norm);

// The norm with fixed statistics.
void fixed_norm(Passes& passes, const Conv& conv, int64_t channels, const BatchNorm& norm);

// Gradients of gamma and beta of a norm from the sums of its backward.
void finish_norm(Passes& passes, int64_t channels, const BatchNorm& norm, const NormSums& sums,
                 const ConvGradients& gradients);

// x minus its mean, in this slot, where x may be.
Map centre(Passes& passes, const Map& x, const double* mean, Slot slot);

// Gradients of x and of the parameters. found.d_folded must not be null if the statistics are the batch's or a gradient
// is wanted. found.d_x, unless null, becomes the gradient of x. x: centred if the statistics are the batch's.
// residual: added to found.d_x; or null.
void linear_backward(Passes& passes, const Conv& conv, const Matrix& weight, const BatchNorm& norm,
                     const LinearGradients& found, const Map& x, const Moments& moments, ConstData residual,
                     const SumOverProcesses& sum, const ConvGradients& gradients);

}  // namespace mnv2::train
