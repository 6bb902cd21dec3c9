#include "linear.h"

namespace mnv2::train {
namespace {

constexpr int64_t kFew = 64;  // pixels of which the gradients of a batch norm are small differences of large sums

}  // namespace

double join_moments(Passes& passes, double count, int64_t channels, bool products, double* mean, double* squares,
                    const SumOverProcesses& sum) {
  if (!sum) return count;
  const int64_t size = 1 + channels + (products ? channels * channels : channels);
  double* const sums = passes.vector(size);
  passes.to_sums(count, channels, products, mean, squares, sums);
  sum(sums, size);
  return passes.from_sums(channels, products, sums, mean, squares);
}

NormSums join_sums(Passes& passes, int64_t channels, const NormSums& from, const SumOverProcesses& sum) {
  if (!sum) return from;
  double* const sums = passes.vector(2 * channels);
  passes.multiply(channels, from.dy, nullptr, sums);
  passes.multiply(channels, from.dy_centred, nullptr, sums + channels);
  sum(sums, 2 * channels);
  return {sums, sums + channels};
}

bool linear_norm(Passes& passes, const Conv& conv, const Matrix& weight, const Map& x, const SumOverProcesses& sum,
                 const Moments& moments, const BatchNorm& norm) {
  double *const mean = passes.vector(weight.rows), *const squares = passes.vector(weight.rows);
  bool cancels = false;
  double count = 0.;
  for (const bool exact : {false, true}) {
    passes.moments(x, exact, moments.mean, moments.products);
    count = join_moments(passes, static_cast<double>(x.pixels), x.channels, true, moments.mean, moments.products, sum);
    cancels = passes.linear_moments(weight, moments.mean, moments.products, count * conv.eps, mean, squares);
    if (!cancels) break;
  }
  passes.norm(conv, weight.rows, mean, squares, count, norm);
  passes.fill(1, count, moments.count);
  return cancels || x.pixels <= kFew;
}

void fixed_norm(Passes& passes, const Conv& conv, int64_t channels, const BatchNorm& norm) {
  passes.norm(conv, channels, conv.mean, conv.var, 1., norm);
}

void finish_norm(Passes& passes, int64_t channels, const BatchNorm& norm, const NormSums& sums,
                 const ConvGradients& gradients) {
  passes.multiply(channels, sums.dy, nullptr, gradients.d_beta);
  passes.multiply(channels, sums.dy_centred, norm.rstd, gradients.d_gamma);
}

Map centre(Passes& passes, const Map& x, const double* mean, Slot slot) {
  double *const ones = passes.vector(x.channels), *const shift = passes.vector(x.channels);
  passes.fill(x.channels, 1., ones);
  passes.fill(x.channels, -1., shift);
  passes.multiply(x.channels, mean, shift, shift);
  const Data out = passes.workspace(slot, x.pixels * x.channels);
  passes.map_combine(
      {.a = x, .scale = ones, .shift = shift, .b = nullptr, .b_scale = nullptr, .c = nullptr, .out = out});
  return {out, x.pixels, x.channels};
}

void linear_backward(Passes& passes, const Conv& conv, const Matrix& weight, const BatchNorm& norm,
                     const LinearGradients& found, const Map& x, const Moments& moments, ConstData residual,
                     const SumOverProcesses& sum, const ConvGradients& gradients) {
  passes.multiply(weight.rows, found.sum_dy, nullptr, gradients.d_beta);
  Data d_weight = gradients.d_weight;
  if (found.d_folded) {
    if (!d_weight) d_weight = found.d_folded;
    passes.linear_gradients(weight, norm, found, conv.batch, d_weight, gradients.d_gamma);
  }
  if (conv.batch) {
    const NormSums total = join_sums(passes, weight.rows, {found.sum_dy, gradients.d_gamma}, sum);
    const double pixels = static_cast<double>(x.pixels), count = sum ? passes.load(moments.count) : pixels;
    passes.linear_correction(weight, norm, total.dy_centred, total.dy, moments.products, count, pixels / count,
                             gradients.d_weight, x, residual, found.d_x);
  } else if (found.d_x && residual) {
    passes.map_add({residual, x.pixels, x.channels}, found.d_x);
  }
}

}  // namespace mnv2::train
