// The passes of training on the CPU: tensors to pointers, checks, threads. mnv2_fused/training puts them together.
#include <algorithm>
#include <cmath>
#include <tuple>

#include "pack.h"
#include "passes.h"
#include "tensors.h"

namespace mnv2 {
namespace {

using Two = std::tuple<Tensor, Tensor>;

// What all passes need, for as long as an operator runs.
struct Context {
  ParallelFor parallel = parallel_for;
  Passes passes{kernels(), this_machine(), parallel};
};

Tensor doubles(const std::vector<int64_t>& sizes) { return empty(sizes, ScalarType::Double, false); }
Tensor floats(const std::vector<int64_t>& sizes) { return empty(sizes, ScalarType::Float, false); }

// A dense channels_last fp32 map (n, c, h, w), of the given channels and size where they are not negative.
const float* check_map(const char* op, const char* argument, const Tensor& t, int64_t n = -1, int64_t c = -1,
                       int64_t h = -1, int64_t w = -1) {
  MNV2_CHECK(t.is_cpu() && t.dim() == 4 && t.scalar_type() == ScalarType::Float, op, argument,
             " must be a float32 tensor (n, c, h, w) on the CPU, got ", describe(t));
  const int64_t sizes[] = {n, c, h, w};
  for (int64_t d = 0; d < 4; ++d) {
    MNV2_CHECK(sizes[d] < 0 || t.size(d) == sizes[d], op, argument, " must have size ", sizes[d], " along dimension ",
               d, ", got ", describe(t));
  }
  check_channels_last(op, t);
  check_memory(op, argument, t);
  return t.const_data_ptr<float>();
}

const double* check_doubles(const char* op, const char* argument, const Tensor& t, const std::vector<int64_t>& sizes) {
  bool same = t.dim() == static_cast<int64_t>(sizes.size());
  for (size_t d = 0; same && d < sizes.size(); ++d) same = t.size(static_cast<int64_t>(d)) == sizes[d];
  MNV2_CHECK(same && t.is_cpu() && t.is_contiguous() && t.scalar_type() == ScalarType::Double, op, argument,
             " must be a contiguous float64 tensor on the CPU of the channels' size, got ", describe(t));
  check_memory(op, argument, t);
  return t.const_data_ptr<double>();
}

// Float64 vectors over channels, (rows, channels) or one of (channels), as fp32, each with zeros up to whole chunks.
class FloatRows {
 public:
  FloatRows(const char* op, const char* argument, const Tensor& t, const std::vector<int64_t>& sizes)
      : channels_(sizes.back()), row_(round_up(channels_, kChunk)) {
    const double* from = check_doubles(op, argument, t, sizes);
    const int64_t rows = channels_ ? t.numel() / channels_ : 0;
    data_.resize(static_cast<size_t>(rows * row_));
    for (int64_t i = 0; i < rows; ++i)
      std::copy_n(from + i * channels_, channels_, &data_[static_cast<size_t>(i * row_)]);
  }
  const float* row(int64_t i) const { return &data_[static_cast<size_t>(i * row_)]; }

 private:
  int64_t channels_, row_;
  std::vector<float> data_;
};

int64_t pixels_of(const Tensor& x) { return x.size(0) * x.size(2) * x.size(3); }

// Map operators divide by the number of pixels.
void check_pixels(const char* op, const Tensor& x) {
  MNV2_CHECK(pixels_of(x) > 0 && x.size(1) > 0, op, "x must not be empty, got ", describe(x));
}

Two train_moments(const Tensor& x) {
  const char* op = "train_moments";
  const float* data = check_map(op, "x", x);
  check_pixels(op, x);
  const int64_t c = x.size(1);
  Tensor mean = doubles({c}), products = doubles({c, c});
  Context().passes.moments(pixels_of(x), c, data, mean.mutable_data_ptr<double>(), products.mutable_data_ptr<double>());
  return {mean, products};
}

Two train_linear_moments(const Tensor& weight, const Tensor& mean, const Tensor& products) {
  const char* op = "train_linear_moments";
  MNV2_CHECK(weight.dim() == 2, op, "weight must have 2 dimensions, got ", describe(weight));
  const int64_t rows = weight.size(0), c = weight.size(1);
  const float* w = check_weight(op, "weight", weight, {rows, c});
  const double* m = check_doubles(op, "mean", mean, {c});
  const double* p = check_doubles(op, "products", products, {c, c});
  Tensor out_mean = doubles({rows}), squares = doubles({rows});
  Context().passes.linear_moments(rows, c, w, m, p, out_mean.mutable_data_ptr<double>(),
                                  squares.mutable_data_ptr<double>());
  return {out_mean, squares};
}

// A vector over channels of any float type that norms have, as float64.
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

// The rows of a batch norm; see schemas.cpp.
enum Norm { kNormScale, kNormShift, kNormMean, kNormVariance, kNormS, kNormBeta, kNormRows };

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
  Tensor norm = doubles({kNormRows, c});
  double* out = norm.mutable_data_ptr<double>();
  for (size_t i = 0; i < channels; ++i) {
    const double s = 1. / std::sqrt(sums[i] / count + eps), scale = s * gammas[i];
    const double rows[] = {scale, betas[i] - means[i] * scale, means[i], sums[i] / (count - 1.), s, betas[i]};
    for (size_t row = 0; row < kNormRows; ++row) out[row * channels + i] = rows[row];
  }
  return norm;
}

const double* check_norm(const char* op, const Tensor& norm) {
  return check_doubles(op, "norm", norm, {kNormRows, norm.dim() == 2 ? norm.size(1) : 0});
}

Tensor train_norm_backward(const Tensor& norm, const OptionalTensor& of_gradient, const OptionalTensor& of_product,
                           double count) {
  const char* op = "train_norm_backward";
  const double* from = check_norm(op, norm);
  const int64_t c = norm.size(1);
  MNV2_CHECK(of_gradient.has_value() == of_product.has_value(), op, "both sums must be given, or none");
  const double* gradient = of_gradient ? check_doubles(op, "of_gradient", *of_gradient, {c}) : nullptr;
  const double* product = of_product ? check_doubles(op, "of_product", *of_product, {c}) : nullptr;
  Tensor rows = doubles({kNormRows, c});
  double* out = rows.mutable_data_ptr<double>();
  std::copy_n(from, 3 * c, out);
  for (int64_t i = 0; i < c; ++i) {
    const double scale = from[kNormScale * c + i], s = from[kNormS * c + i], mean = from[kNormMean * c + i];
    const double of_input = product ? scale * s * s * product[i] / -count : 0.;
    out[3 * c + i] = scale;
    out[4 * c + i] = of_input;
    out[5 * c + i] = gradient ? scale * gradient[i] / -count - of_input * mean : 0.;
  }
  return rows;
}

Two train_linear_gradients(const Tensor& norm, const Tensor& weight, const Tensor& products, const Tensor& of_beta,
                           bool batch) {
  const char* op = "train_linear_gradients";
  const double* n = check_norm(op, norm);
  const int64_t rows = norm.size(1), c = weight.dim() == 2 ? weight.size(1) : 0;
  const float* w = check_weight(op, "weight", weight, {rows, c});
  const float* a = check_weight(op, "products", products, {rows, c});
  const double* beta = check_doubles(op, "of_beta", of_beta, {rows});
  Tensor gradient = floats({rows, c}), of_gamma = doubles({rows});
  double* gamma = of_gamma.mutable_data_ptr<double>();
  Context().passes.scale_rows(rows, c, a, n + kNormScale * rows, gradient.mutable_data_ptr<float>(), w, gamma);
  for (int64_t i = 0; i < rows; ++i) {
    gamma[i] = n[kNormS * rows + i] * (batch ? gamma[i] : gamma[i] - n[kNormMean * rows + i] * beta[i]);
  }
  return {gradient, of_gamma};
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

Two train_map_products(const Tensor& a, const Tensor& b, const Tensor& mean) {
  const char* op = "train_map_products";
  const float* of_a = check_map(op, "a", a);
  const float* of_b = check_map(op, "b", b, a.size(0), a.size(1), a.size(2), a.size(3));
  const FloatRows m(op, "mean", mean, {a.size(1)});
  Tensor sum = doubles({a.size(1)}), products = doubles({a.size(1)});
  Context().passes.map_products(pixels_of(a), a.size(1), of_a, of_b, m.row(0), sum.mutable_data_ptr<double>(),
                                products.mutable_data_ptr<double>());
  return {sum, products};
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
  Tensor made = out ? *out : new_map({a.size(0), a.size(1), a.size(2), a.size(3)});
  task.out = const_cast<float*>(same("out", made));
  Context().passes.map_combine(pixels_of(a), task);
  return made;
}

void train_linear_correction(const Tensor& weight_gradient, const OptionalTensor& input_gradient, const Tensor& norm,
                             const Tensor& weight, const Tensor& of_gamma, const Tensor& of_beta, const Tensor& moments,
                             double count, double share, const OptionalTensor& x, const OptionalTensor& residual) {
  const char* op = "train_linear_correction";
  const double* n = check_norm(op, norm);
  const int64_t rows = norm.size(1), c = weight.dim() == 2 ? weight.size(1) : 0;
  const float* w = check_weight(op, "weight", weight, {rows, c});
  float* dw = const_cast<float*>(check_weight(op, "weight_gradient", weight_gradient, {rows, c}));
  const double* gamma = check_doubles(op, "of_gamma", of_gamma, {rows});
  const double* beta = check_doubles(op, "of_beta", of_beta, {rows});
  const double* products = check_doubles(op, "moments", moments, {c, c});
  MNV2_CHECK(x.has_value() == input_gradient.has_value(), op, "x and input_gradient must be given together");
  const Context context;
  const Passes& passes = context.passes;

  std::vector<double> factors(static_cast<size_t>(rows)), nothing(static_cast<size_t>(c));
  for (int64_t i = 0; i < rows; ++i) {
    factors[static_cast<size_t>(i)] = n[kNormScale * rows + i] * n[kNormS * rows + i] * gamma[i] / count;
  }
  Tensor scaled = floats({rows, c}), matrix = floats({c, c});
  float* of_scaled = scaled.mutable_data_ptr<float>();
  float* of_matrix = matrix.mutable_data_ptr<float>();
  passes.scale_rows(rows, c, w, factors.data(), of_scaled, nullptr, nullptr);
  for (int64_t i = 0; i < c * c; ++i) of_matrix[i] = static_cast<float>(products[i] * share);
  InputGradientTask task{};
  task.channels = c;
  task.a = task.out = dw;
  task.x = of_scaled;
  passes.input_backward(rows, task, of_matrix, nothing.data());
  if (!input_gradient) return;

  const float* through_weights = check_map(op, "input_gradient", *input_gradient, -1, c);
  const auto same = [&](const char* name, const Tensor& t) {
    return check_map(op, name, t, input_gradient->size(0), c, input_gradient->size(2), input_gradient->size(3));
  };
  std::vector<float> of_beta_scaled(static_cast<size_t>(rows)), vector(static_cast<size_t>(c));
  for (int64_t i = 0; i < rows; ++i) {
    of_beta_scaled[static_cast<size_t>(i)] = static_cast<float>(n[kNormScale * rows + i] * beta[i] / count);
  }
  passes.product(rows, 1, c, of_beta_scaled.data(), w, vector.data());
  passes.product(rows, c, c, w, of_scaled, of_matrix);
  task.a = through_weights;
  task.out = const_cast<float*>(through_weights);
  task.x = same("x", *x);
  task.residual = residual ? same("residual", *residual) : nullptr;
  const std::vector<double> shift(vector.begin(), vector.end());
  passes.input_backward(pixels_of(*input_gradient), task, of_matrix, shift.data());
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

// Of a map that is not empty.
BlockShape shape_of(const char* op, const Tensor& x, const std::vector<int64_t>& block,
                    const std::vector<double>& bounds) {
  check_map(op, "x", x);
  BlockShape s = block_shape(op, x, block, bounds);
  s.residual = false;  // the shortcut is no part of the passes
  MNV2_CHECK(pixels_of(x) > 0, op, "x must not be empty, got ", describe(x));
  return s;
}

// Floats in a wide map.
int64_t wide_size(const BlockShape& s) { return round_up(s.c_hidden, kChunk) * s.n * h_out(s) * w_out(s); }

const float* check_packed_block(const char* op, const Tensor& packed, const BlockShape& s) {
  return check_packed_floats(op, packed, block_size(s, kernels().lanes));
}

// One of the second batch norm's vectors; see schemas.cpp.
enum SecondNorm { kScale, kShift, kMean, kGradient, kHidden, kConstant };

// The task's second batch norm: `second`, whose first `rows` rows are wanted.
void set_second(TrainTask& task, const FloatRows& second, int64_t rows) {
  task.scale = second.row(kScale);
  task.shift = second.row(kShift);
  task.mean = second.row(kMean);
  for (int64_t i = 0; i + kGradient < rows; ++i) task.backward[i] = second.row(kGradient + i);
}

float* wide(const char* op, const char* argument, const OptionalTensor& t, const BlockShape& s) {
  return t ? const_cast<float*>(check_weight(op, argument, *t, {wide_size(s)})) : nullptr;
}

TrainTask forward_task(const char* op, const BlockShape& s, const Tensor& x, const Tensor& packed) {
  TrainTask task{};
  task.x = x.const_data_ptr<float>();
  task.packed = check_packed_block(op, packed, s);
  return task;
}

TrainTask backward_task(const char* op, const BlockShape& s, const Tensor& x, const Tensor& packed,
                        const Tensor& packed_backward) {
  TrainTask task = forward_task(op, s, x, packed);
  task.packed_backward = check_packed_block(op, packed_backward, backward_shape(s));
  return task;
}

Tensor train_pack(const OptionalTensor& expand, const OptionalTensor& expand_norm, const Tensor& depthwise,
                  const OptionalTensor& depthwise_norm, const Tensor& project, const OptionalTensor& project_norm,
                  bool backward) {
  const char* op = "train_pack";
  MNV2_CHECK(depthwise.dim() == 4 && project.dim() == 4 && (!expand || expand->dim() == 4), op,
             "weights must have 4 dimensions");
  const int64_t c_hidden = depthwise.size(0), kernel = depthwise.size(2), c_out = project.size(0);
  const int64_t c_in = expand ? expand->size(1) : c_hidden;
  const BlockShape s = block_of_weights(c_in, c_hidden, c_out, kernel, expand.has_value());
  check_shape(op, s);
  const auto norm = [&](const char* argument, const OptionalTensor& t, int64_t channels) {
    if (!t) return BlockWeights::Norm{};
    MNV2_CHECK(t->is_cpu() && t->dim() == 2 && t->size(0) >= 2 && t->size(1) == channels && t->stride(1) == 1 &&
                   t->scalar_type() == ScalarType::Double,
               op, argument, " must be float64 rows on the CPU of ", channels, " channels, got ", describe(*t));
    check_memory(op, argument, *t);
    const double* scale = t->const_data_ptr<double>();
    return BlockWeights::Norm{scale, scale + t->stride(0)};
  };
  BlockWeights w{};
  if (expand) w.expand = check_weight(op, "expand", *expand, {c_hidden, c_in, 1, 1});
  w.depthwise = check_weight(op, "depthwise", depthwise, {c_hidden, 1, kernel, kernel});
  w.project = check_weight(op, "project", project, {c_out, c_hidden, 1, 1});
  w.expand_norm = norm("expand_norm", expand_norm, c_hidden);
  w.depthwise_norm = norm("depthwise_norm", depthwise_norm, c_hidden);
  w.project_norm = norm("project_norm", project_norm, c_out);
  const Lanes lanes = kernels().lanes;
  Tensor packed = empty({4 * block_size(backward ? backward_shape(s) : s, lanes)}, ScalarType::Byte, false);
  (backward ? pack_backward : pack_block)(c_in, c_hidden, c_out, kernel, w, lanes, parallel_for,
                                          static_cast<float*>(packed.mutable_data_ptr()));
  return packed;
}

Tensor train_buffer(int64_t size) {
  MNV2_CHECK(size >= 0, "train_buffer", "size must not be negative, got ", size);
  Tensor buffer = floats({size});
  advise_huge_pages(buffer.mutable_data_ptr<float>(), size * 4);
  return buffer;
}

Two train_hidden(const Tensor& x, const Tensor& packed, const std::vector<int64_t>& block,
                 const std::vector<double>& bounds, const OptionalTensor& hidden) {
  const char* op = "train_hidden";
  const BlockShape s = shape_of(op, x, block, bounds);
  TrainTask task = forward_task(op, s, x, packed);
  task.hidden = wide(op, "hidden", hidden, s);
  Tensor mean = doubles({s.c_hidden}), squares = doubles({s.c_hidden});
  Context().passes.hidden(s, task, mean.mutable_data_ptr<double>(), squares.mutable_data_ptr<double>());
  return {mean, squares};
}

Tensor train_project(const Tensor& x, const Tensor& hidden, const Tensor& packed, const Tensor& second,
                     const std::vector<int64_t>& block, const std::vector<double>& bounds) {
  const char* op = "train_project";
  const BlockShape s = shape_of(op, x, block, bounds);
  const FloatRows rows(op, "second", second, {std::max<int64_t>(second.size(0), kGradient), s.c_hidden});
  TrainTask task = forward_task(op, s, x, packed);
  task.hidden = wide(op, "hidden", hidden, s);
  set_second(task, rows, kGradient);
  Tensor out = new_map({s.n, s.c_out, h_out(s), w_out(s)});
  task.out = out.mutable_data_ptr<float>();
  Context().passes.project(s, task);
  return out;
}

std::tuple<Tensor, Tensor, Tensor> train_project_backward(const Tensor& x, const OptionalTensor& hidden, bool made,
                                                          const OptionalTensor& gradient, const Tensor& dz,
                                                          const Tensor& packed, const Tensor& packed_backward,
                                                          const Tensor& second, const std::vector<int64_t>& block,
                                                          const std::vector<double>& bounds, bool weight) {
  const char* op = "train_project_backward";
  const BlockShape s = shape_of(op, x, block, bounds);
  const FloatRows rows(op, "second", second, {std::max<int64_t>(second.size(0), kGradient), s.c_hidden});
  TrainTask task = backward_task(op, s, x, packed, packed_backward);
  task.d_project = check_map(op, "dz", dz, s.n, s.c_out, h_out(s), w_out(s));
  task.hidden = wide(op, "hidden", hidden, s);
  task.hidden_kept = made && task.hidden;
  task.d_hidden = wide(op, "gradient", gradient, s);
  set_second(task, rows, kGradient);
  Tensor project_weight = floats(weight ? std::vector<int64_t>{s.c_out, s.c_hidden} : std::vector<int64_t>{0});
  Tensor of_gradient = doubles({s.c_hidden}), of_product = doubles({s.c_hidden});
  Context().passes.project_backward(s, task, weight ? project_weight.mutable_data_ptr<float>() : nullptr,
                                    of_gradient.mutable_data_ptr<double>(), of_product.mutable_data_ptr<double>());
  return {project_weight, of_gradient, of_product};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> train_hidden_backward(
    const Tensor& x, const OptionalTensor& hidden, const OptionalTensor& gradient, const Tensor& dz,
    const Tensor& packed, const Tensor& packed_backward, const Tensor& second, const std::vector<int64_t>& block,
    const std::vector<double>& bounds, bool input, bool weight, bool with_projection, bool project_weight) {
  const char* op = "train_hidden_backward";
  const BlockShape s = shape_of(op, x, block, bounds);
  const FloatRows rows(op, "second", second, {kConstant + 1, s.c_hidden});
  MNV2_CHECK(!gradient || hidden, op, "gradient must be given with hidden");
  MNV2_CHECK(!gradient || !with_projection, op, "with_projection makes the gradient, which must not be given");
  TrainTask task = backward_task(op, s, x, packed, packed_backward);
  task.d_project = check_map(op, "dz", dz, s.n, s.c_out, h_out(s), w_out(s));
  task.hidden = wide(op, "hidden", hidden, s);
  task.d_hidden = wide(op, "gradient", gradient, s);
  set_second(task, rows, kConstant + 1);
  if (std::all_of(task.backward[1], task.backward[1] + s.c_hidden, [](float b) { return b == 0.f; })) {
    task.backward[1] = nullptr;
  }
  Tensor out = input ? new_map({s.n, s.c_in, s.h, s.w}) : floats({0});
  if (input) task.out = out.mutable_data_ptr<float>();
  const auto wanted = [](bool asked, const std::vector<int64_t>& sizes) {
    return floats(asked ? sizes : std::vector<int64_t>{0});
  };
  const auto data = [](bool asked, Tensor& t) { return asked ? t.mutable_data_ptr<float>() : nullptr; };
  const int64_t sums = with_projection ? s.c_hidden : 0;
  Tensor depthwise = floats({s.c_hidden, s.kernel * s.kernel}), expand = wanted(weight, {s.c_hidden, s.c_in});
  Tensor project = wanted(with_projection && project_weight, {s.c_out, s.c_hidden});
  Tensor first = doubles({s.c_hidden}), of_gradient = doubles({sums}), of_product = doubles({sums});
  Context().passes.hidden_backward(
      s, task,
      {depthwise.mutable_data_ptr<float>(), data(weight, expand), first.mutable_data_ptr<double>(), with_projection,
       data(with_projection && project_weight, project), of_gradient.mutable_data_ptr<double>(),
       of_product.mutable_data_ptr<double>()});
  return {out, depthwise, expand, first, project, of_gradient, of_product};
}

std::tuple<Tensor, Tensor, Tensor> train_linear_backward(const Tensor& x, const Tensor& gradient, const Tensor& packed,
                                                         const Tensor& packed_backward,
                                                         const std::vector<double>& bounds, bool input) {
  const char* op = "train_linear_backward";
  const int64_t c_hidden = gradient.dim() == 4 ? gradient.size(1) : 0;
  check_map(op, "x", x);
  MNV2_CHECK(pixels_of(x) > 0, op, "x must not be empty, got ", describe(x));
  BlockShape s = block_of_weights(x.size(1), c_hidden, 1, 1, true);  // an expansion, and nothing behind it
  s.n = x.size(0), s.h = x.size(2), s.w = x.size(3);
  s.act = check_bounds(op, bounds);
  check_shape(op, s);
  TrainTask task = backward_task(op, s, x, packed, packed_backward);
  task.d_out = check_map(op, "gradient", gradient, s.n, c_hidden, s.h, s.w);
  Tensor out = input ? new_map({s.n, s.c_in, s.h, s.w}) : floats({0});
  if (input) task.out = out.mutable_data_ptr<float>();
  Tensor expand = floats({c_hidden, s.c_in}), of_gradient = doubles({c_hidden});
  Passes::Gradients gradients{};
  gradients.expand = expand.mutable_data_ptr<float>();
  gradients.first = of_gradient.mutable_data_ptr<double>();
  Context().passes.hidden_backward(s, task, gradients);
  return {out, expand, of_gradient};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mnv2_fused, CompositeExplicitAutograd, m) {
  m.impl("train_buffer", TORCH_BOX(&train_buffer));
}

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
  m.impl("train_pack", TORCH_BOX(&train_pack));
  m.impl("train_hidden", TORCH_BOX(&train_hidden));
  m.impl("train_project", TORCH_BOX(&train_project));
  m.impl("train_project_backward", TORCH_BOX(&train_project_backward));
  m.impl("train_hidden_backward", TORCH_BOX(&train_hidden_backward));
  m.impl("train_linear_backward", TORCH_BOX(&train_linear_backward));
}

}  // namespace mnv2
