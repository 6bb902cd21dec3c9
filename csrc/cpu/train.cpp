// The operators of the passes over a block's hidden channels on the CPU: checks, tensors to pointers, threads.
#include "pack.h"
#include "train_tensors.h"

namespace mnv2 {
namespace {

// The shape of a block on `x`, which must not be empty. Shortcut and output activation are no part of the passes.
BlockShape shape_of(const char* op, const Tensor& x, const std::vector<int64_t>& block,
                    const std::vector<double>& bounds) {
  check_map(op, "x", x);
  const Activation act = check_bounds(op, bounds);
  BlockShape s = block_shape(op, x, block, {act.lo, act.hi, kNoActivation.lo, kNoActivation.hi});
  s.residual = false;
  MNV2_CHECK(pixels_of(x) > 0, op, "x must not be empty, got ", describe(x));
  return s;
}

const float* check_packed_block(const char* op, const Tensor& packed, const BlockShape& s) {
  return check_packed_floats(op, packed, block_size(s, kernels().lanes));
}

// The depthwise norm: rows that begin with scale, shift and mean.
FloatRows depthwise_norm_of(const char* op, const Tensor& norm, const BlockShape& s) {
  return FloatRows(op, "depthwise_norm", norm, {std::max<int64_t>(norm.size(0), kMean + 1), s.c_hidden});
}

void set_norm(TrainTask& task, const FloatRows& norm) {
  task.scale = norm.row(kScale);
  task.shift = norm.row(kShift);
  task.mean = norm.row(kMean);
}

// The same for the rows of train_norm_backward.
void set_norm_backward(TrainTask& task, const FloatRows& rows, int64_t channels) {
  set_norm(task, rows);
  task.backward[0] = rows.row(kDOutput);
  task.backward[1] = rows.row(kInput);
  task.backward[2] = rows.row(kConstant);
  const bool fixed_statistics =
      std::all_of(task.backward[1], task.backward[1] + channels, [](float factor) { return factor == 0.f; });
  if (fixed_statistics) task.backward[1] = nullptr;
}

float* hidden_map(const char* op, const char* argument, const OptionalTensor& t, const BlockShape& s) {
  const int64_t size = round_up(s.c_hidden, kChunk) * s.n * h_out(s) * w_out(s);
  return t ? const_cast<float*>(check_weight(op, argument, *t, {size})) : nullptr;
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
  task.hidden = hidden_map(op, "hidden", hidden, s);
  Tensor mean = doubles({s.c_hidden}), squares = doubles({s.c_hidden});
  Context().passes.hidden(s, task, mean.mutable_data_ptr<double>(), squares.mutable_data_ptr<double>());
  return {mean, squares};
}

Tensor train_project(const Tensor& x, const Tensor& hidden, const Tensor& packed, const Tensor& depthwise_norm,
                     const std::vector<int64_t>& block, const std::vector<double>& bounds) {
  const char* op = "train_project";
  const BlockShape s = shape_of(op, x, block, bounds);
  const FloatRows norm = depthwise_norm_of(op, depthwise_norm, s);
  TrainTask task = forward_task(op, s, x, packed);
  task.hidden = hidden_map(op, "hidden", hidden, s);
  set_norm(task, norm);
  Tensor out = new_map({s.n, s.c_out, h_out(s), w_out(s)});
  task.out = out.mutable_data_ptr<float>();
  Context().passes.project(s, task);
  return out;
}

// Outputs that were not asked for are empty, and null for the passes.
Tensor floats_if(bool wanted, const std::vector<int64_t>& sizes) {
  return floats(wanted ? sizes : std::vector<int64_t>{0});
}
float* data_if(bool wanted, Tensor& t) { return wanted ? t.mutable_data_ptr<float>() : nullptr; }

std::tuple<Tensor, Tensor, Tensor> train_project_backward(const Tensor& x, const OptionalTensor& hidden,
                                                          bool hidden_saved, const OptionalTensor& d_hidden,
                                                          const Tensor& d_project, const Tensor& packed,
                                                          const Tensor& packed_backward, const Tensor& depthwise_norm,
                                                          const std::vector<int64_t>& block,
                                                          const std::vector<double>& bounds, bool wants_project) {
  const char* op = "train_project_backward";
  const BlockShape s = shape_of(op, x, block, bounds);
  const FloatRows norm = depthwise_norm_of(op, depthwise_norm, s);
  TrainTask task = backward_task(op, s, x, packed, packed_backward);
  task.d_project = check_map(op, "d_project", d_project, s.n, s.c_out, h_out(s), w_out(s));
  task.hidden = hidden_map(op, "hidden", hidden, s);
  task.hidden_kept = hidden_saved && task.hidden;
  task.d_hidden = hidden_map(op, "d_hidden", d_hidden, s);
  set_norm(task, norm);
  Tensor d_project_weight = floats_if(wants_project, {s.c_out, s.c_hidden});
  Tensor sum_dy = doubles({s.c_hidden}), sum_dy_centred = doubles({s.c_hidden});
  Context().passes.project_backward(s, task, data_if(wants_project, d_project_weight),
                                    sum_dy.mutable_data_ptr<double>(), sum_dy_centred.mutable_data_ptr<double>());
  return {d_project_weight, sum_dy, sum_dy_centred};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> train_hidden_backward(
    const Tensor& x, const OptionalTensor& hidden, const OptionalTensor& d_hidden, const Tensor& d_project,
    const Tensor& packed, const Tensor& packed_backward, const Tensor& norm_backward, const std::vector<int64_t>& block,
    const std::vector<double>& bounds, bool wants_x, bool wants_expand, bool with_projection, bool wants_project) {
  const char* op = "train_hidden_backward";
  const BlockShape s = shape_of(op, x, block, bounds);
  const FloatRows rows(op, "norm_backward", norm_backward, {kBackwardRows, s.c_hidden});
  MNV2_CHECK(!d_hidden || hidden, op, "d_hidden must be given with hidden, got d_hidden alone");
  MNV2_CHECK(!d_hidden || !with_projection, op, "d_hidden must not be given with with_projection, which computes it");
  TrainTask task = backward_task(op, s, x, packed, packed_backward);
  task.d_project = check_map(op, "d_project", d_project, s.n, s.c_out, h_out(s), w_out(s));
  task.hidden = hidden_map(op, "hidden", hidden, s);
  task.d_hidden = hidden_map(op, "d_hidden", d_hidden, s);
  set_norm_backward(task, rows, s.c_hidden);
  Tensor d_x = wants_x ? new_map({s.n, s.c_in, s.h, s.w}) : floats({0});
  task.out = data_if(wants_x, d_x);
  wants_project = wants_project && with_projection;
  const int64_t sums = with_projection ? s.c_hidden : 0;
  Tensor d_depthwise_weight = floats({s.c_hidden, s.kernel * s.kernel});
  Tensor d_expand_weight = floats_if(wants_expand, {s.c_hidden, s.c_in});
  Tensor d_project_weight = floats_if(wants_project, {s.c_out, s.c_hidden});
  Tensor sum_d_expand = doubles({s.c_hidden}), sum_d_expand_linear = doubles({s.c_hidden});
  Tensor sum_dy = doubles({sums}), sum_dy_centred = doubles({sums});
  Context().passes.hidden_backward(s, task,
                                   {.d_depthwise_weight = d_depthwise_weight.mutable_data_ptr<float>(),
                                    .d_expand_weight = data_if(wants_expand, d_expand_weight),
                                    .sum_d_expand = sum_d_expand.mutable_data_ptr<double>(),
                                    .sum_d_expand_linear = sum_d_expand_linear.mutable_data_ptr<double>(),
                                    .with_projection = with_projection,
                                    .d_project_weight = data_if(wants_project, d_project_weight),
                                    .sum_dy = sum_dy.mutable_data_ptr<double>(),
                                    .sum_dy_centred = sum_dy_centred.mutable_data_ptr<double>()});
  return {d_x,    d_depthwise_weight, d_expand_weight, sum_d_expand, sum_d_expand_linear, d_project_weight,
          sum_dy, sum_dy_centred};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> train_linear_backward(const Tensor& x, const Tensor& dy,
                                                                 const Tensor& packed, const Tensor& packed_backward,
                                                                 const std::vector<double>& bounds, bool wants_x) {
  const char* op = "train_linear_backward";
  const int64_t c_out = dy.dim() == 4 ? dy.size(1) : 0;
  check_map(op, "x", x);
  MNV2_CHECK(pixels_of(x) > 0, op, "x must not be empty, got ", describe(x));
  BlockShape s = block_of_weights(x.size(1), c_out, 1, 1, true);  // a block that ends at the expansion's clamp
  s.n = x.size(0), s.h = x.size(2), s.w = x.size(3);
  s.act = check_bounds(op, bounds);
  check_shape(op, s);
  TrainTask task = backward_task(op, s, x, packed, packed_backward);
  task.d_out = check_map(op, "dy", dy, s.n, c_out, s.h, s.w);
  Tensor d_x = wants_x ? new_map({s.n, s.c_in, s.h, s.w}) : floats({0});
  task.out = data_if(wants_x, d_x);
  Tensor d_folded = floats({c_out, s.c_in}), sum_dy = doubles({c_out}), sum_dy_linear = doubles({c_out});
  Passes::Gradients gradients{};
  gradients.d_expand_weight = d_folded.mutable_data_ptr<float>();
  gradients.sum_d_expand = sum_dy.mutable_data_ptr<double>();
  gradients.sum_d_expand_linear = sum_dy_linear.mutable_data_ptr<double>();
  Context().passes.hidden_backward(s, task, gradients);
  return {d_x, d_folded, sum_dy, sum_dy_linear};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mnv2_fused, CompositeExplicitAutograd, m) {
  m.impl("train_buffer", TORCH_BOX(&train_buffer));
}

STABLE_TORCH_LIBRARY_IMPL(mnv2_fused, CPU, m) {
  m.impl("train_pack", TORCH_BOX(&train_pack));
  m.impl("train_hidden", TORCH_BOX(&train_hidden));
  m.impl("train_project", TORCH_BOX(&train_project));
  m.impl("train_project_backward", TORCH_BOX(&train_project_backward));
  m.impl("train_hidden_backward", TORCH_BOX(&train_hidden_backward));
  m.impl("train_linear_backward", TORCH_BOX(&train_linear_backward));
}

}  // namespace mnv2
