#include "train_passes.h"

#include <algorithm>

#include "../train/windows.h"
#include "pack.h"
#include "run.h"
#include "scratch.h"

namespace mnv2 {
namespace {

using train::ConstData;
using train::Data;

mnv2::BlockWeights unfolded(const train::BlockWeights& weights) {
  mnv2::BlockWeights w{};
  w.expand = floats(weights.expand);
  w.depthwise = floats(weights.depthwise);
  w.project = floats(weights.project);
  return w;
}

// Whether linear_moments() found that sums cancel in some row, from the norm that followed.
bool cancels(const train::Matrix& weight, const double* products, const double* rstd, double count) {
  constexpr int64_t kChains = 8;
  const int64_t c = weight.columns;
  const float* w = floats(weight.data);
  std::vector<double> diagonal(static_cast<size_t>(c));
  for (int64_t i = 0; i < c; ++i) diagonal[static_cast<size_t>(i)] = products[i * c + i];
  for (int64_t row = 0; row < weight.rows; ++row, w += c) {
    double sums[kChains] = {}, sum = 0.;
    int64_t i = 0;
    for (; i + kChains <= c; i += kChains) {
      for (int64_t j = 0; j < kChains; ++j) {
        sums[j] += static_cast<double>(w[i + j] * w[i + j]) * diagonal[static_cast<size_t>(i + j)];
      }
    }
    for (; i < c; ++i) sum += static_cast<double>(w[i] * w[i]) * diagonal[static_cast<size_t>(i)];
    for (const double chain : sums) sum += chain;
    if (sum > train::kCancels * count / (rstd[row] * rstd[row])) return true;
  }
  return false;
}

// d_weight -= diag(factors) weight (products * share), in fp64.
void correct_weight(const train::Matrix& weight, const double* factors, const double* products, double share,
                    float* d_weight) {
  const int64_t c = weight.columns;
  const float* w = floats(weight.data);
  std::vector<double> sums(static_cast<size_t>(c));
  for (int64_t row = 0; row < weight.rows; ++row, w += c, d_weight += c) {
    std::fill(sums.begin(), sums.end(), 0.);
    for (int64_t i = 0; i < c; ++i) {
      for (int64_t j = 0; j < c; ++j) sums[static_cast<size_t>(j)] += w[i] * products[i * c + j];
    }
    for (int64_t j = 0; j < c; ++j) {
      d_weight[j] = static_cast<float>(d_weight[j] - factors[row] * share * sums[static_cast<size_t>(j)]);
    }
  }
}

}  // namespace

// ------------------------------------------------------------------------------------------------------------ memory

Data CpuPasses::workspace(train::Slot slot, int64_t elements) {
  const int use = static_cast<int>(ScratchUse::kTraining) + static_cast<int>(slot);
  return scratch(static_cast<ScratchUse>(use), elements);
}

double* CpuPasses::vector(int64_t size) {
  vectors_.emplace_back(new double[static_cast<size_t>(size)]);
  return vectors_.back().get();
}

const float* CpuPasses::narrow(const double* from, int64_t channels) {
  const int64_t row = round_up(channels, kChunk);
  float* const to = reinterpret_cast<float*>(vector(divide_up(row, 2)));
  std::fill(std::copy_n(from, channels, to), to + row, 0.f);
  return to;
}

int64_t CpuPasses::hidden_size(const BlockShape& s) const {
  return round_up(s.c_hidden, kChunk) * s.n * h_out(s) * w_out(s);
}

// ----------------------------------------------------------------------------------------------- maps and linear maps

void CpuPasses::moments(const train::Map& x, bool exact, double* mean, double* products) {
  passes_.moments(x.pixels, x.channels, floats(x.data), exact, mean, products);
}

bool CpuPasses::linear_moments(const train::Matrix& weight, const double* mean, const double* products, double least,
                               double* out_mean, double* out_squares) {
  double* const uncorrelated = vector(weight.rows);
  passes_.linear_moments(weight.rows, weight.columns, floats(weight.data), mean, products, out_mean, out_squares,
                         uncorrelated);
  bool cancels = false;
  for (int64_t i = 0; i < weight.rows; ++i) {
    cancels = cancels || uncorrelated[i] > train::kCancels * (out_squares[i] + least);
  }
  return cancels;
}

void CpuPasses::linear_gradients(const train::Matrix& weight, const train::BatchNorm& norm,
                                 const train::LinearGradients& found, bool batch, Data d_weight, double* d_gamma) {
  passes_.scale_rows(weight.rows, weight.columns, floats(found.d_folded), norm.scale, floats(d_weight),
                     floats(weight.data), d_gamma);
  for (int64_t i = 0; i < weight.rows; ++i) {
    d_gamma[i] = train::linear_d_gamma(norm, i, d_gamma[i], found.sum_dy[i], found.sum_dy_linear[i], batch);
  }
}

void CpuPasses::linear_correction(const train::Matrix& weight, const train::BatchNorm& norm, const double* d_gamma,
                                  const double* d_beta, const double* products, double count, double share,
                                  Data d_weight, const train::Map& x, ConstData residual, Data d_x) {
  const int64_t rows = weight.rows, c = weight.columns;
  // d_weight -= diag(factors) weight (products * share)
  double *const factors = vector(rows), *const shift = vector(c);
  for (int64_t i = 0; i < rows; ++i) factors[i] = norm.scale[i] * norm.rstd[i] * d_gamma[i] / count;
  float* const scaled = scratch(ScratchUse::kScaled, rows * c + c * c + rows + c);
  float *const matrix = scaled + rows * c, *const scaled_beta = matrix + c * c, *const row = scaled_beta + rows;
  // d_x -= weight' (scale * d_beta / count) + weight' diag(factors) weight x
  for (int64_t i = 0; i < rows; ++i) scaled_beta[i] = static_cast<float>(norm.scale[i] * d_beta[i] / count);
  passes_.product(rows, 1, c, scaled_beta, floats(weight.data), row);
  passes_.scale_rows(rows, c, floats(weight.data), factors, scaled, nullptr, nullptr);
  InputGradientTask task{};
  task.channels = c;
  if (d_weight && cancels(weight, products, norm.rstd, count)) {
    correct_weight(weight, factors, products, share, floats(d_weight));
  } else if (d_weight) {
    for (int64_t i = 0; i < c * c; ++i) matrix[i] = static_cast<float>(products[i] * share);
    task.a = task.out = floats(d_weight);
    task.x = scaled;
    std::fill_n(shift, c, 0.);
    passes_.input_backward(rows, task, matrix, shift);
  }
  if (!d_x) return;
  passes_.product(rows, c, c, floats(weight.data), scaled, matrix);
  std::copy_n(row, c, shift);
  task.a = task.out = floats(d_x);
  task.x = floats(x.data);
  task.residual = floats(residual);
  passes_.input_backward(x.pixels, task, matrix, shift);
}

void CpuPasses::scale_rows(int64_t rows, int64_t columns, const double* scale, Data matrix) {
  passes_.scale_rows(rows, columns, floats(matrix), scale, floats(matrix), nullptr, nullptr);
}

void CpuPasses::map_moments(const train::Map& x, double* mean, double* squares) {
  passes_.map_moments(x.pixels, x.channels, floats(x.data), mean, squares);
}

void CpuPasses::map_products(const train::Map& dy, ConstData x, const double* mean, const train::NormSums& sums) {
  passes_.map_products(dy.pixels, dy.channels, floats(dy.data), floats(x), narrow(mean, dy.channels), sums.dy,
                       sums.dy_centred);
}

void CpuPasses::map_combine(const train::Combination& from) {
  MapTask task{};
  task.channels = from.a.channels;
  task.a = floats(from.a.data);
  task.b = floats(from.b);
  task.c = floats(from.c);
  task.scale[0] = narrow(from.scale, task.channels);
  task.scale[1] = from.b ? narrow(from.b_scale, task.channels) : task.scale[0];
  task.shift = narrow(from.shift, task.channels);
  task.out = floats(from.out);
  passes_.map_combine(from.a.pixels, task);
}

void CpuPasses::map_add(const train::Map& from, Data to) {
  double *const one = vector(from.channels), *const zero = vector(from.channels);
  std::fill_n(one, from.channels, 1.);
  std::fill_n(zero, from.channels, 0.);
  map_combine({.a = {to, from.pixels, from.channels},
               .scale = one,
               .shift = zero,
               .b = nullptr,
               .b_scale = nullptr,
               .c = from.data,
               .out = to});
}

// ------------------------------------------------------------------------------------------------------------- blocks

void CpuPasses::set_block(const BlockShape& s, const train::BlockWeights& weights) {
  block_ = s;
  block_.residual = false;
  block_.out = kNoActivation;
  weights_ = weights;
  mnv2::BlockWeights w = unfolded(weights);
  w.expand_norm = {weights.expand_scale, weights.expand_shift};
  const Lanes lanes = passes_.machine.lanes;
  float* const packed = scratch(ScratchUse::kPacked, block_size(s, lanes));
  pack_block(s.c_in, s.c_hidden, s.c_out, s.kernel, w, lanes, parallel_, packed);
  packed_ = packed;
}

void CpuPasses::set_backward(const double* project_scale) {
  const BlockShape& s = block_;
  mnv2::BlockWeights w = unfolded(weights_);
  w.expand_norm = {weights_.expand_scale, weights_.expand_shift};
  w.project_norm = {project_scale, nullptr};
  const Lanes lanes = passes_.machine.lanes;
  float* const packed = scratch(ScratchUse::kPackedBackward, block_size(backward_shape(s), lanes));
  pack_backward(s.c_in, s.c_hidden, s.c_out, s.kernel, w, lanes, parallel_, packed);
  packed_backward_ = packed;
}

TrainTask CpuPasses::task_of(ConstData x) const {
  TrainTask task{};
  task.x = floats(x);
  task.packed = packed_;
  task.packed_backward = packed_backward_;
  return task;
}

void CpuPasses::set_norm(TrainTask& task, const train::BatchNorm& norm) {
  task.scale = narrow(norm.scale, block_.c_hidden);
  task.shift = narrow(norm.shift, block_.c_hidden);
  task.mean = narrow(norm.mean, block_.c_hidden);
}

void CpuPasses::hidden(ConstData x, Data hidden, double* mean, double* squares) {
  TrainTask task = task_of(x);
  task.hidden = floats(hidden);
  passes_.hidden(block_, task, mean, squares);
}

void CpuPasses::project(ConstData x, ConstData hidden, const train::BatchNorm& depthwise, Data out) {
  if (hidden) {
    TrainTask task = task_of(x);
    task.hidden = readable(hidden);
    task.out = floats(out);
    set_norm(task, depthwise);
    return passes_.project(block_, task);
  }
  // The kernel of inference, with both norms folded in.
  mnv2::BlockWeights w = unfolded(weights_);
  w.expand_norm = {weights_.expand_scale, weights_.expand_shift};
  w.depthwise_norm = {depthwise.scale, depthwise.shift};
  const BlockShape& s = block_;
  const Machine& machine = passes_.machine;
  float* const packed = scratch(ScratchUse::kPackedBackward, block_size(s, machine.lanes));
  pack_block(s.c_in, s.c_hidden, s.c_out, s.kernel, w, machine.lanes, parallel_, packed);
  run_block(passes_.kernels, machine, s, DType::kFloat32, x, packed, out, parallel_);
}

void CpuPasses::project_backward(ConstData x, Data hidden, bool saved, Data d_hidden, ConstData d_project,
                                 const train::BatchNorm& depthwise, const train::ProjectGradients& found) {
  TrainTask task = task_of(x);
  task.d_project = floats(d_project);
  task.hidden = floats(hidden);
  task.hidden_kept = saved;
  task.d_hidden = floats(d_hidden);
  set_norm(task, depthwise);
  passes_.project_backward(block_, task, floats(found.d_weight), found.sums.dy, found.sums.dy_centred);
}

void CpuPasses::hidden_backward(ConstData x, ConstData hidden, ConstData d_hidden, ConstData d_project,
                                const train::BatchNorm& depthwise, const train::BatchNormBackward& backward,
                                const train::HiddenGradients& found) {
  const int64_t channels = block_.c_hidden;
  TrainTask task = task_of(x);
  task.d_project = floats(d_project);
  task.hidden = readable(hidden);
  task.d_hidden = readable(d_hidden);
  set_norm(task, depthwise);
  task.backward[0] = narrow(backward.d_output, channels);
  task.backward[1] = narrow(backward.input, channels);
  task.backward[2] = narrow(backward.constant, channels);
  const bool fixed =
      std::all_of(task.backward[1], task.backward[1] + channels, [](float factor) { return factor == 0.f; });
  if (fixed) task.backward[1] = nullptr;
  task.out = floats(found.expand.d_x);
  passes_.hidden_backward(block_, task,
                          {.d_depthwise_weight = floats(found.d_depthwise),
                           .d_expand_weight = floats(found.expand.d_folded),
                           .sum_d_expand = found.expand.sum_dy,
                           .sum_d_expand_linear = found.expand.sum_dy_linear,
                           .with_projection = found.with_project,
                           .d_project_weight = found.with_project ? floats(found.project.d_weight) : nullptr,
                           .sum_dy = found.project.sums.dy,
                           .sum_dy_centred = found.project.sums.dy_centred});
}

// ------------------------------------------------------------------------------------------------ dense convolutions

void CpuPasses::windows(const DenseShape& s, ConstData x, const int64_t strides[4], Data out) {
  passes_.windows(s, floats(x), strides, floats(out));
}

void CpuPasses::add_windows(const DenseShape& s, ConstData windows, Data out) {
  const auto task = [&](int64_t image, float*) { train::add_windows_of(s, image, floats(windows), floats(out)); };
  run_stages({{s.n, 0, task}}, passes_.machine.threads, parallel_);
}

void CpuPasses::window_matrix(const DenseShape& s, ConstData from, bool back, Data to) {
  train::permute_windows(s, floats(from), back, floats(to));
}

void CpuPasses::dense(const DenseShape& s, ConstData x, const int64_t strides[4], ConstData weight, const double* scale,
                      const double* shift, Data y) {
  const int64_t row = s.c_in * s.kernel * s.kernel;
  const Machine& machine = passes_.machine;
  float* const folded = scratch(ScratchUse::kScaled, s.c_out * row);
  for (int64_t i = 0; i < s.c_out * row; ++i) {  // rounded once
    folded[i] = static_cast<float>(static_cast<double>(floats(weight)[i]) * scale[i / row]);
  }
  float* const packed = scratch(ScratchUse::kPacked, stem_size(s.c_in, s.c_out, s.kernel, machine.lanes));
  pack_stem(s.c_in, s.c_out, s.kernel, folded, narrow(shift, s.c_out), machine.lanes, packed);
  run_stem(passes_.kernels, machine, s, DType::kFloat32, {x, {strides[0], strides[1], strides[2], strides[3]}}, packed,
           nullptr, y, parallel_);
}

void CpuPasses::set_linear(const BlockShape& s, ConstData weight, const double* scale, const double* shift) {
  double* const zeros = vector(s.c_hidden);
  std::fill_n(zeros, s.c_hidden, 0.);
  const float* const nothing = narrow(zeros, s.c_hidden);
  set_block(s, {weight, nothing, nothing, scale, shift});
  set_backward(nullptr);
}

void CpuPasses::linear_backward(const BlockShape& s, ConstData x, ConstData dy, ConstData weight, const double* scale,
                                const double* shift, const train::LinearGradients& found) {
  set_linear(s, weight, scale, shift);
  TrainTask task = task_of(x);
  task.d_out = floats(dy);
  task.out = floats(found.d_x);
  mnv2::Passes::Gradients gradients{};
  gradients.d_expand_weight = floats(found.d_folded);
  gradients.sum_d_expand = found.sum_dy;
  gradients.sum_d_expand_linear = found.sum_dy_linear;
  passes_.hidden_backward(block_, task, gradients);
}

}  // namespace mnv2
