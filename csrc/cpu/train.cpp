// The passes of training on the CPU: tensors to pointers, checks, threads. mnv2_fused/training.py puts them together.
#include <tuple>

#include "passes.h"
#include "torch.h"

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
  return t.const_data_ptr<float>();
}

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
  const float* m = check_weight(op, "mean", mean, {a.size(1)});
  Tensor sum = doubles({a.size(1)}), products = doubles({a.size(1)});
  Context().passes.map_products(pixels_of(a), a.size(1), of_a, of_b, m, sum.mutable_data_ptr<double>(),
                                products.mutable_data_ptr<double>());
  return {sum, products};
}

Tensor train_map_combine(const Tensor& a, const Tensor& scale, const Tensor& shift, const OptionalTensor& b,
                         const OptionalTensor& b_scale, const OptionalTensor& c) {
  const char* op = "train_map_combine";
  MNV2_CHECK(b.has_value() == b_scale.has_value(), op, "b and b_scale must be given together");
  const auto same = [&](const char* name, const Tensor& t) {
    return check_map(op, name, t, a.size(0), a.size(1), a.size(2), a.size(3));
  };
  MapTask task{};
  task.a = check_map(op, "a", a);
  task.channels = a.size(1);
  task.scale[0] = check_weight(op, "scale", scale, {a.size(1)});
  task.shift = check_weight(op, "shift", shift, {a.size(1)});
  if (b) {
    task.b = same("b", *b);
    task.scale[1] = check_weight(op, "b_scale", *b_scale, {a.size(1)});
  }
  if (c) task.c = same("c", *c);
  Tensor out = empty({a.size(0), a.size(1), a.size(2), a.size(3)}, ScalarType::Float, true);
  task.out = out.mutable_data_ptr<float>();
  Context().passes.map_combine(pixels_of(a), task);
  return out;
}

Tensor train_input_backward(const Tensor& a, const Tensor& x, const Tensor& mean, const Tensor& matrix,
                            const Tensor& vector, const OptionalTensor& residual) {
  const char* op = "train_input_backward";
  const int64_t c = a.dim() == 4 ? a.size(1) : 0;
  const auto same = [&](const char* name, const Tensor& t) {
    return check_map(op, name, t, a.size(0), a.size(1), a.size(2), a.size(3));
  };
  InputGradientTask task{};
  task.a = check_map(op, "a", a);
  task.channels = c;
  task.x = same("x", x);
  task.mean = check_weight(op, "mean", mean, {c});
  if (residual) task.residual = same("residual", *residual);
  const float* m = check_weight(op, "matrix", matrix, {c, c});
  const float* v = check_weight(op, "vector", vector, {c});
  Tensor out = empty({a.size(0), a.size(1), a.size(2), a.size(3)}, ScalarType::Float, true);
  task.out = out.mutable_data_ptr<float>();
  Context().passes.input_backward(pixels_of(a), task, m, v);
  return out;
}

Tensor train_windows(const Tensor& x, int64_t kernel, int64_t stride, const std::vector<int64_t>& padding) {
  const char* op = "train_windows";
  MNV2_CHECK(x.is_cpu() && x.dim() == 4 && x.scalar_type() == ScalarType::Float, op,
             "x must be a float32 tensor (n, c, h, w) on the CPU, got ", describe(x));
  check_padding(op, padding);
  const StemShape s{x.size(0),  x.size(2),  x.size(3),  x.size(1),  1,   kernel, stride,
                    padding[0], padding[1], padding[2], padding[3], 0.f, 0.f};
  check_shape(op, s);
  Tensor out = empty({s.n, kernel * kernel * s.c_in, h_out(s), w_out(s)}, ScalarType::Float, true);
  const int64_t strides[] = {x.stride(0), x.stride(1), x.stride(2), x.stride(3)};
  Context().passes.windows(s, x.const_data_ptr<float>(), strides, out.mutable_data_ptr<float>());
  return out;
}

// The block's shape from the operators' integers: c_hidden, c_out, kernel, stride, dilation, padding (4), has_expand.
BlockShape shape_of(const char* op, const Tensor& x, const std::vector<int64_t>& v, const std::vector<double>& bounds) {
  MNV2_CHECK(v.size() == 10 && bounds.size() == 2, op, "shape and bounds must have 10 and 2 values, got ", v.size(),
             " and ", bounds.size());
  check_map(op, "x", x);
  const BlockShape s{x.size(0),
                     x.size(2),
                     x.size(3),
                     x.size(1),
                     v[0],
                     v[1],
                     v[2],
                     v[3],
                     v[4],
                     v[5],
                     v[6],
                     v[7],
                     v[8],
                     v[9] != 0,
                     false,
                     static_cast<float>(bounds[0]),
                     static_cast<float>(bounds[1])};
  check_shape(op, s);
  MNV2_CHECK(pixels_of(x) > 0, op, "x must not be empty, got ", describe(x));
  return s;
}

// The rows of a (rows, c_hidden) tensor, each with zeros up to whole chunks.
class PaddedRows {
 public:
  PaddedRows(const char* op, const char* argument, const Tensor& t, int64_t rows, const BlockShape& s)
      : row_(round_up(s.c_hidden, kChunk)), data_(static_cast<size_t>(rows * row_)) {
    const float* from = check_weight(op, argument, t, {rows, s.c_hidden});
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t c = 0; c < s.c_hidden; ++c) data_[static_cast<size_t>(i * row_ + c)] = from[i * s.c_hidden + c];
    }
  }
  const float* operator[](int64_t i) const { return &data_[static_cast<size_t>(i * row_)]; }

 private:
  int64_t row_;
  std::vector<float> data_;
};

std::vector<int64_t> wide_sizes(const BlockShape& s) {
  return {divide_up(s.c_hidden, kChunk), s.n * h_out(s) * w_out(s), kChunk};
}

const float* check_packed_block(const char* op, const Tensor& packed, const BlockShape& s) {
  return check_packed(op, packed,
                      block_layout(s.c_in, s.c_hidden, s.c_out, s.kernel, s.has_expand, kernels().lanes).size);
}

std::tuple<Tensor, Tensor, Tensor> train_hidden(const Tensor& x, const Tensor& packed,
                                                const std::vector<int64_t>& shape, const std::vector<double>& bounds,
                                                bool keep) {
  const char* op = "train_hidden";
  const BlockShape s = shape_of(op, x, shape, bounds);
  TrainTask task{};
  task.x = x.const_data_ptr<float>();
  task.packed = check_packed_block(op, packed, s);
  Tensor hidden = floats(keep ? wide_sizes(s) : std::vector<int64_t>{0});
  if (keep) task.hidden = hidden.mutable_data_ptr<float>();
  Tensor mean = doubles({s.c_hidden}), squares = doubles({s.c_hidden});
  Context().passes.hidden(s, task, mean.mutable_data_ptr<double>(), squares.mutable_data_ptr<double>());
  return {hidden, mean, squares};
}

Tensor train_project(const Tensor& x, const Tensor& hidden, const Tensor& packed, const Tensor& affine,
                     const std::vector<int64_t>& shape, const std::vector<double>& bounds) {
  const char* op = "train_project";
  const BlockShape s = shape_of(op, x, shape, bounds);
  const PaddedRows rows(op, "affine", affine, 3, s);
  TrainTask task{};
  task.x = x.const_data_ptr<float>();
  task.packed = check_packed_block(op, packed, s);
  task.hidden = const_cast<float*>(check_weight(op, "hidden", hidden, wide_sizes(s)));
  task.scale = rows[0];
  task.shift = rows[1];
  Tensor out = empty({s.n, s.c_out, h_out(s), w_out(s)}, ScalarType::Float, true);
  task.out = out.mutable_data_ptr<float>();
  Context().passes.project(s, task);
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> train_project_backward(
    const Tensor& x, const OptionalTensor& hidden, const Tensor& z_gradient, const Tensor& packed,
    const Tensor& packed_backward, const Tensor& affine, const std::vector<int64_t>& shape,
    const std::vector<double>& bounds, bool keep, bool weight) {
  const char* op = "train_project_backward";
  const BlockShape s = shape_of(op, x, shape, bounds);
  const PaddedRows rows(op, "affine", affine, 3, s);
  TrainTask task{};
  task.x = x.const_data_ptr<float>();
  task.packed = check_packed_block(op, packed, s);
  task.packed_backward = check_packed_block(op, packed_backward, backward_shape(s));
  task.z_gradient = check_map(op, "z_gradient", z_gradient, s.n, s.c_out, h_out(s), w_out(s));
  task.scale = rows[0];
  task.shift = rows[1];
  task.mean = rows[2];
  const std::vector<int64_t> wide = keep ? wide_sizes(s) : std::vector<int64_t>{0};
  Tensor made = floats(hidden ? std::vector<int64_t>{0} : wide), gradient = floats(wide);
  if (hidden) {
    task.hidden = const_cast<float*>(check_weight(op, "hidden", *hidden, wide_sizes(s)));
    task.hidden_kept = true;
  } else if (keep) {
    task.hidden = made.mutable_data_ptr<float>();
  }
  if (keep) task.hidden_gradient = gradient.mutable_data_ptr<float>();
  Tensor project_weight = floats(weight ? std::vector<int64_t>{s.c_out, s.c_hidden} : std::vector<int64_t>{0});
  Tensor of_gradient = doubles({s.c_hidden}), of_product = doubles({s.c_hidden});
  Context().passes.project_backward(s, task, weight ? project_weight.mutable_data_ptr<float>() : nullptr,
                                    of_gradient.mutable_data_ptr<double>(), of_product.mutable_data_ptr<double>());
  return {made, gradient, project_weight, of_gradient, of_product};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> train_hidden_backward(
    const Tensor& x, const OptionalTensor& x_centred, const OptionalTensor& hidden,
    const OptionalTensor& hidden_gradient, const Tensor& z_gradient, const Tensor& packed,
    const Tensor& packed_backward, const Tensor& affine, const Tensor& backward, const std::vector<int64_t>& shape,
    const std::vector<double>& bounds, bool input) {
  const char* op = "train_hidden_backward";
  const BlockShape s = shape_of(op, x, shape, bounds);
  const PaddedRows rows(op, "affine", affine, 3, s), backward_rows(op, "backward", backward, 3, s);
  MNV2_CHECK(hidden.has_value() == hidden_gradient.has_value(), op,
             "hidden and hidden_gradient must be given together");
  TrainTask task{};
  task.x = x.const_data_ptr<float>();
  task.packed = check_packed_block(op, packed, s);
  task.packed_backward = check_packed_block(op, packed_backward, backward_shape(s));
  task.z_gradient = check_map(op, "z_gradient", z_gradient, s.n, s.c_out, h_out(s), w_out(s));
  if (x_centred) task.x_centred = check_map(op, "x_centred", *x_centred, s.n, s.c_in, s.h, s.w);
  if (hidden) {
    task.hidden = const_cast<float*>(check_weight(op, "hidden", *hidden, wide_sizes(s)));
    task.hidden_gradient = const_cast<float*>(check_weight(op, "hidden_gradient", *hidden_gradient, wide_sizes(s)));
  }
  task.scale = rows[0];
  task.shift = rows[1];
  task.mean = rows[2];
  for (int64_t i = 0; i < 3; ++i) task.backward[i] = backward_rows[i];
  Tensor out = input ? empty({s.n, s.c_in, s.h, s.w}, ScalarType::Float, true) : floats({0});
  if (input) task.out = out.mutable_data_ptr<float>();
  Tensor depthwise = floats({s.c_hidden, s.kernel * s.kernel}), of_gradient = doubles({s.c_hidden});
  Tensor expand = floats(x_centred ? std::vector<int64_t>{s.c_hidden, s.c_in} : std::vector<int64_t>{0});
  Context().passes.hidden_backward(s, task, depthwise.mutable_data_ptr<float>(),
                                   x_centred ? expand.mutable_data_ptr<float>() : nullptr,
                                   of_gradient.mutable_data_ptr<double>());
  return {out, depthwise, expand, of_gradient};
}

std::tuple<Tensor, Tensor, Tensor> train_linear_backward(const Tensor& x, const Tensor& x_centred,
                                                         const Tensor& gradient, const Tensor& packed,
                                                         const Tensor& packed_backward,
                                                         const std::vector<double>& bounds, bool input) {
  const char* op = "train_linear_backward";
  const int64_t c_hidden = gradient.dim() == 4 ? gradient.size(1) : 0;
  const BlockShape s = shape_of(op, x, {c_hidden, 1, 1, 1, 1, 0, 0, 0, 0, 1}, bounds);
  TrainTask task{};
  task.x = x.const_data_ptr<float>();
  task.x_centred = check_map(op, "x_centred", x_centred, s.n, s.c_in, s.h, s.w);
  task.output_gradient = check_map(op, "gradient", gradient, s.n, c_hidden, s.h, s.w);
  task.packed = check_packed_block(op, packed, s);
  task.packed_backward = check_packed_block(op, packed_backward, backward_shape(s));
  Tensor out = input ? empty({s.n, s.c_in, s.h, s.w}, ScalarType::Float, true) : floats({0});
  if (input) task.out = out.mutable_data_ptr<float>();
  Tensor expand = floats({c_hidden, s.c_in}), of_gradient = doubles({c_hidden});
  Context().passes.hidden_backward(s, task, nullptr, expand.mutable_data_ptr<float>(),
                                   of_gradient.mutable_data_ptr<double>());
  return {out, expand, of_gradient};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mnv2_fused, CPU, m) {
  m.impl("train_moments", TORCH_BOX(&train_moments));
  m.impl("train_map_moments", TORCH_BOX(&train_map_moments));
  m.impl("train_map_products", TORCH_BOX(&train_map_products));
  m.impl("train_map_combine", TORCH_BOX(&train_map_combine));
  m.impl("train_input_backward", TORCH_BOX(&train_input_backward));
  m.impl("train_windows", TORCH_BOX(&train_windows));
  m.impl("train_hidden", TORCH_BOX(&train_hidden));
  m.impl("train_project", TORCH_BOX(&train_project));
  m.impl("train_project_backward", TORCH_BOX(&train_project_backward));
  m.impl("train_hidden_backward", TORCH_BOX(&train_hidden_backward));
  m.impl("train_linear_backward", TORCH_BOX(&train_linear_backward));
}

}  // namespace mnv2
