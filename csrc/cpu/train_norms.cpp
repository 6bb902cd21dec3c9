// The operators of batch norms and of the maps around a block, on the CPU: checks, tensors to pointers, threads.
// docs/training.md has the formulas.
#include <cmath>

#include "train_tensors.h"

namespace mnv2 {
namespace {

// Map operators divide by the number of pixels.
void check_pixels(const char* op, const Tensor& x) {
  MNV2_CHECK(pixels_of(x) > 0 && x.size(1) > 0, op, "x must not be empty, got ", describe(x));
}

Two train_moments(const Tensor& x, bool exact) {
  const char* op = "train_moments";
  const float* data = check_map(op, "x", x);
  check_pixels(op, x);
  const int64_t c = x.size(1);
  Tensor mean = doubles({c}), products = doubles({c, c});
  Context().passes.moments(pixels_of(x), c, data, exact, mean.mutable_data_ptr<double>(),
                           products.mutable_data_ptr<double>());
  return {mean, products};
}

// Above this ratio of uncorrelated squares to squares fp32 products are too coarse; see NOTES.md.
constexpr double kCancels = 8.;

std::tuple<Tensor, Tensor, bool> train_linear_moments(const Tensor& weight, const Tensor& mean, const Tensor& products,
                                                      double least) {
  const char* op = "train_linear_moments";
  MNV2_CHECK(weight.dim() == 2, op, "weight must have 2 dimensions, got ", describe(weight));
  const int64_t rows = weight.size(0), c = weight.size(1);
  const float* w = check_weight(op, "weight", weight, {rows, c});
  const double* m = check_doubles(op, "mean", mean, {c});
  const double* p = check_doubles(op, "products", products, {c, c});
  Tensor out_mean = doubles({rows}), squares = doubles({rows});
  std::vector<double> uncorrelated(static_cast<size_t>(rows));
  Context().passes.linear_moments(rows, c, w, m, p, out_mean.mutable_data_ptr<double>(),
                                  squares.mutable_data_ptr<double>(), uncorrelated.data());
  const double* sums = squares.const_data_ptr<double>();
  bool cancels = false;
  for (int64_t i = 0; i < rows; ++i) {
    cancels = cancels || uncorrelated[static_cast<size_t>(i)] > kCancels * (sums[i] + least);
  }
  return {out_mean, squares, cancels};
}

// A float32 or float64 vector over channels, as float64.
std::vector<double> vector_of(const char* op, const char* argument, const Tensor& t, int64_t channels) {
  const bool wide = t.scalar_type() == ScalarType::Double;
  MNV2_CHECK(t.is_cpu() && t.dim() == 1 && t.size(0) == channels && (wide || t.scalar_type() == ScalarType::Float), op,
             argument, " must be a float32 or float64 tensor on the CPU of the channels' size, got ", describe(t));
  check_memory(op, argument, t);
  std::vector<double> values(static_cast<size_t>(channels));
  const auto copy = [&values, step = t.stride(0)](const auto* from) {
    for (double& value : values) value = static_cast<double>(*from), from += step;
  };
  wide ? copy(t.const_data_ptr<double>()) : copy(t.const_data_ptr<float>());
  return values;
}

// The rows of a batch norm with known statistics, a float64 tensor (6, channels); see schemas.cpp.
template <class T>
struct BatchNorm {
  static constexpr int64_t kRows = 6;
  T *scale, *shift, *mean, *unbiased, *rstd, *beta;

  BatchNorm(T* data, int64_t channels)
      : scale(data),
        shift(data + channels),
        mean(data + 2 * channels),
        unbiased(data + 3 * channels),
        rstd(data + 4 * channels),
        beta(data + 5 * channels) {}
};

Tensor train_norm(const OptionalTensor& gamma, const OptionalTensor& beta, const Tensor& mean, const Tensor& squares,
                  double count, double eps) {
  const char* op = "train_norm";
  MNV2_CHECK(mean.dim() == 1, op, "mean must have 1 dimension, got ", describe(mean));
  const int64_t c = mean.size(0);
  const size_t channels = static_cast<size_t>(c);
  const std::vector<double> means = vector_of(op, "mean", mean, c), sums = vector_of(op, "squares", squares, c);
  const auto or_else = [&](const char* argument, const OptionalTensor& t, double value) {
    return t ? vector_of(op, argument, *t, c) : std::vector<double>(channels, value);
  };
  const std::vector<double> gammas = or_else("gamma", gamma, 1.), betas = or_else("beta", beta, 0.);
  Tensor norm = doubles({BatchNorm<double>::kRows, c});
  const BatchNorm<double> out(norm.mutable_data_ptr<double>(), c);
  for (size_t i = 0; i < channels; ++i) {
    const double rstd = 1. / std::sqrt(sums[i] / count + eps), scale = rstd * gammas[i];
    out.scale[i] = scale;
    out.shift[i] = betas[i] - means[i] * scale;
    out.mean[i] = means[i];
    out.unbiased[i] = sums[i] / (count - 1.);
    out.rstd[i] = rstd;
    out.beta[i] = betas[i];
  }
  return norm;
}

BatchNorm<const double> check_norm(const char* op, const Tensor& norm) {
  const int64_t c = norm.dim() == 2 ? norm.size(1) : 0;
  return {check_doubles(op, "norm", norm, {BatchNorm<const double>::kRows, c}), c};
}

Tensor train_norm_backward(const Tensor& norm, const OptionalTensor& sum_dy, const OptionalTensor& sum_dy_centred,
                           double count) {
  const char* op = "train_norm_backward";
  const BatchNorm<const double> from = check_norm(op, norm);
  const int64_t c = norm.size(1);
  MNV2_CHECK(sum_dy.has_value() == sum_dy_centred.has_value(), op,
             "sum_dy and sum_dy_centred must be given together, got only ", sum_dy ? "sum_dy" : "sum_dy_centred");
  const double* dy = sum_dy ? check_doubles(op, "sum_dy", *sum_dy, {c}) : nullptr;
  const double* dy_centred = sum_dy_centred ? check_doubles(op, "sum_dy_centred", *sum_dy_centred, {c}) : nullptr;
  Tensor rows = doubles({kBackwardRows, c});
  double* out = rows.mutable_data_ptr<double>();
  std::copy_n(from.scale, c, out + kScale * c);
  std::copy_n(from.shift, c, out + kShift * c);
  std::copy_n(from.mean, c, out + kMean * c);
  for (int64_t i = 0; i < c; ++i) {
    const double scale = from.scale[i], rstd = from.rstd[i];
    const double input_factor = dy_centred ? scale * rstd * rstd * dy_centred[i] / -count : 0.;
    out[kDOutput * c + i] = scale;
    out[kInput * c + i] = input_factor;
    out[kConstant * c + i] = dy ? scale * dy[i] / -count - input_factor * from.mean[i] : 0.;
  }
  return rows;
}

// Above this ratio of beta to gamma the sum of dy * (scale z) has lost digits to beta.
constexpr double kFar = 8.;

Two train_linear_gradients(const Tensor& norm, const Tensor& weight, const Tensor& d_folded, const Tensor& sum_dy,
                           const Tensor& sum_dy_linear, bool batch) {
  const char* op = "train_linear_gradients";
  const BatchNorm<const double> n = check_norm(op, norm);
  const int64_t rows = norm.size(1), c = weight.dim() == 2 ? weight.size(1) : 0;
  const float* w = check_weight(op, "weight", weight, {rows, c});
  const float* folded = check_weight(op, "d_folded", d_folded, {rows, c});
  const double* dy = check_doubles(op, "sum_dy", sum_dy, {rows});
  const double* linear = check_doubles(op, "sum_dy_linear", sum_dy_linear, {rows});
  Tensor d_weight = floats({rows, c}), d_gamma = doubles({rows});
  double* gamma = d_gamma.mutable_data_ptr<double>();
  Context().passes.scale_rows(rows, c, folded, n.scale, d_weight.mutable_data_ptr<float>(), w, gamma);
  for (int64_t i = 0; i < rows; ++i) {
    double product = gamma[i];
    if (!batch) product -= n.mean[i] * dy[i];
    // The same from the values that the pass computed: their rounding cancels in the gradients, as in PyTorch's.
    if (batch && std::abs(n.beta[i]) * n.rstd[i] < kFar * std::abs(n.scale[i])) product = linear[i] / n.scale[i];
    gamma[i] = n.rstd[i] * product;
  }
  return {d_weight, d_gamma};
}

Two train_map_moments(const Tensor& x) {
  const char* op = "train_map_moments";
  const float* data = check_map(op, "x", x);
  check_pixels(op, x);
  Tensor mean = doubles({x.size(1)}), squares = doubles({x.size(1)});
  Context().passes.map_moments(pixels_of(x), x.size(1), data, mean.mutable_data_ptr<double>(),
                               squares.mutable_data_ptr<double>());
  return {mean, squares};
}

Two train_map_products(const Tensor& dy, const Tensor& x, const Tensor& mean) {
  const char* op = "train_map_products";
  const float* dy_data = check_map(op, "dy", dy);
  const int64_t c = dy.size(1);
  const float* x_data = check_map(op, "x", x, dy.size(0), c, dy.size(2), dy.size(3));
  const FloatRows m(op, "mean", mean, {c});
  Tensor sum_dy = doubles({c}), sum_dy_centred = doubles({c});
  Context().passes.map_products(pixels_of(dy), c, dy_data, x_data, m.row(0), sum_dy.mutable_data_ptr<double>(),
                                sum_dy_centred.mutable_data_ptr<double>());
  return {sum_dy, sum_dy_centred};
}

Tensor train_map_combine(const Tensor& a, const Tensor& scale, const Tensor& shift, const OptionalTensor& b,
                         const OptionalTensor& b_scale, const OptionalTensor& c, const OptionalTensor& out) {
  const char* op = "train_map_combine";
  MNV2_CHECK(b.has_value() == b_scale.has_value(), op, "b and b_scale must be given together");
  const auto same = [&](const char* name, const Tensor& t) {
    return check_map(op, name, t, a.size(0), a.size(1), a.size(2), a.size(3));
  };
  MapTask task{};
  task.a = check_map(op, "a", a);
  task.channels = a.size(1);
  const FloatRows scales(op, "scale", scale, {a.size(1)}), shifts(op, "shift", shift, {a.size(1)});
  const FloatRows b_scales(op, "b_scale", b ? *b_scale : scale, {a.size(1)});
  task.scale[0] = scales.row(0);
  task.scale[1] = b_scales.row(0);
  task.shift = shifts.row(0);
  if (b) task.b = same("b", *b);
  if (c) task.c = same("c", *c);
  Tensor result = out ? *out : new_map({a.size(0), a.size(1), a.size(2), a.size(3)});
  task.out = const_cast<float*>(same("out", result));
  Context().passes.map_combine(pixels_of(a), task);
  return result;
}

// Whether train_linear_moments found that sums cancel in some row, from the norm that followed.
bool cancels(int64_t rows, int64_t c, const float* w, const double* products, const double* rstd, double count) {
  constexpr int64_t kChains = 8;
  std::vector<double> diagonal(static_cast<size_t>(c));
  for (int64_t i = 0; i < c; ++i) diagonal[static_cast<size_t>(i)] = products[i * c + i];
  for (int64_t row = 0; row < rows; ++row, w += c) {
    double sums[kChains] = {}, sum = 0.;
    int64_t i = 0;
    for (; i + kChains <= c; i += kChains) {
      for (int64_t j = 0; j < kChains; ++j) {
        sums[j] += static_cast<double>(w[i + j] * w[i + j]) * diagonal[static_cast<size_t>(i + j)];
      }
    }
    for (; i < c; ++i) sum += static_cast<double>(w[i] * w[i]) * diagonal[static_cast<size_t>(i)];
    for (const double chain : sums) sum += chain;
    if (sum > kCancels * count / (rstd[row] * rstd[row])) return true;
  }
  return false;
}

// d_weight -= diag(factors) weight (products * share), in fp64.
void correct_weight(int64_t rows, int64_t c, const float* w, const double* factors, const double* products,
                    double share, float* d_weight) {
  std::vector<double> sums(static_cast<size_t>(c));
  for (int64_t row = 0; row < rows; ++row, w += c, d_weight += c) {
    std::fill(sums.begin(), sums.end(), 0.);
    for (int64_t i = 0; i < c; ++i) {
      for (int64_t j = 0; j < c; ++j) sums[static_cast<size_t>(j)] += w[i] * products[i * c + j];
    }
    for (int64_t j = 0; j < c; ++j) {
      d_weight[j] = static_cast<float>(d_weight[j] - factors[row] * share * sums[static_cast<size_t>(j)]);
    }
  }
}

// The terms of the statistics in the gradients of a linear map with batch norm; see docs/training.md.
void train_linear_correction(const Tensor& d_weight, const OptionalTensor& d_x, const Tensor& norm,
                             const Tensor& weight, const Tensor& d_gamma, const Tensor& d_beta, const Tensor& products,
                             double count, double share, const OptionalTensor& x, const OptionalTensor& residual) {
  const char* op = "train_linear_correction";
  const BatchNorm<const double> n = check_norm(op, norm);
  const int64_t rows = norm.size(1), c = weight.dim() == 2 ? weight.size(1) : 0;
  const float* w = check_weight(op, "weight", weight, {rows, c});
  float* dw = const_cast<float*>(check_weight(op, "d_weight", d_weight, {rows, c}));
  const double* gamma = check_doubles(op, "d_gamma", d_gamma, {rows});
  const double* beta = check_doubles(op, "d_beta", d_beta, {rows});
  const double* p = check_doubles(op, "products", products, {c, c});
  MNV2_CHECK(x.has_value() == d_x.has_value(), op, "x and d_x must be given together, got only ", x ? "x" : "d_x");
  const Context context;
  const Passes& passes = context.passes;

  // d_weight -= diag(factors) weight (products * share)
  std::vector<double> factors(static_cast<size_t>(rows)), zeros(static_cast<size_t>(c));
  for (int64_t i = 0; i < rows; ++i) factors[static_cast<size_t>(i)] = n.scale[i] * n.rstd[i] * gamma[i] / count;
  Tensor scaled_weight = floats({rows, c}), square = floats({c, c});
  float* scaled = scaled_weight.mutable_data_ptr<float>();
  float* matrix = square.mutable_data_ptr<float>();
  passes.scale_rows(rows, c, w, factors.data(), scaled, nullptr, nullptr);
  InputGradientTask task{};
  task.channels = c;
  if (cancels(rows, c, w, p, n.rstd, count)) {
    correct_weight(rows, c, w, factors.data(), p, share, dw);
  } else {
    for (int64_t i = 0; i < c * c; ++i) matrix[i] = static_cast<float>(p[i] * share);
    task.a = task.out = dw;
    task.x = scaled;
    passes.input_backward(rows, task, matrix, zeros.data());
  }
  if (!d_x) return;

  // d_x -= weight' (scale * d_beta / count) + weight' diag(factors) weight x
  const auto same = [&](const char* name, const Tensor& t) {
    return check_map(op, name, t, d_x->size(0), c, d_x->size(2), d_x->size(3));
  };
  const float* dx = check_map(op, "d_x", *d_x, -1, c);
  std::vector<float> scaled_beta(static_cast<size_t>(rows)), vector(static_cast<size_t>(c));
  for (int64_t i = 0; i < rows; ++i) {
    scaled_beta[static_cast<size_t>(i)] = static_cast<float>(n.scale[i] * beta[i] / count);
  }
  passes.product(rows, 1, c, scaled_beta.data(), w, vector.data());
  passes.product(rows, c, c, w, scaled, matrix);
  task.a = dx;
  task.out = const_cast<float*>(dx);
  task.x = same("x", *x);
  task.residual = residual ? same("residual", *residual) : nullptr;
  const std::vector<double> shift(vector.begin(), vector.end());
  passes.input_backward(pixels_of(*d_x), task, matrix, shift.data());
}

void train_windows(const Tensor& x, const std::vector<int64_t>& dense, const Tensor& out) {
  const char* op = "train_windows";
  MNV2_CHECK(x.is_cpu() && x.dim() == 4 && x.scalar_type() == ScalarType::Float, op,
             "x must be a float32 tensor (n, c, h, w) on the CPU, got ", describe(x));
  check_memory(op, "x", x);
  const DenseShape s = dense_shape(op, x, dense, {0., 0.});
  const float* to = check_map(op, "out", out, s.n, s.kernel * s.kernel * s.c_in, h_out(s), w_out(s));
  const int64_t strides[] = {x.stride(0), x.stride(1), x.stride(2), x.stride(3)};
  Context().passes.windows(s, x.const_data_ptr<float>(), strides, const_cast<float*>(to));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mnv2_fused, CPU, m) {
  m.impl("train_moments", TORCH_BOX(&train_moments));
  m.impl("train_linear_moments", TORCH_BOX(&train_linear_moments));
  m.impl("train_norm", TORCH_BOX(&train_norm));
  m.impl("train_norm_backward", TORCH_BOX(&train_norm_backward));
  m.impl("train_linear_gradients", TORCH_BOX(&train_linear_gradients));
  m.impl("train_map_moments", TORCH_BOX(&train_map_moments));
  m.impl("train_map_products", TORCH_BOX(&train_map_products));
  m.impl("train_map_combine", TORCH_BOX(&train_map_combine));
  m.impl("train_linear_correction", TORCH_BOX(&train_linear_correction));
  m.impl("train_windows", TORCH_BOX(&train_windows));
}

}  // namespace mnv2
