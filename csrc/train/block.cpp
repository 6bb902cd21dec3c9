#include "block.h"

namespace mnv2::train {
namespace {

BlockWeights weights_of(const Block& block, const double* expand_scale, const double* expand_shift) {
  return {block.shape.has_expand ? block.expand.weight : nullptr, block.depthwise.weight, block.project.weight,
          expand_scale, expand_shift};
}

// The norm behind a map, of the batch or fixed. Returns the pixels of all processes, 0 if fixed.
template <class MapMoments>
double map_norm(Passes& passes, const Conv& conv, int64_t pixels, int64_t channels, const SumOverProcesses& sum,
                const BatchNorm& norm, const MapMoments& moments) {
  if (!conv.batch) {
    fixed_norm(passes, conv, channels, norm);
    return 0.;
  }
  double *const mean = passes.vector(channels), *const squares = passes.vector(channels);
  moments(mean, squares);
  const double count = join_moments(passes, static_cast<double>(pixels), channels, false, mean, squares, sum);
  passes.norm(conv, channels, mean, squares, count, norm);
  return count;
}

// One backward of a block.
class Backward {
 public:
  Backward(Passes& passes, const Block& block, const BlockState& state, const BlockNeeds& needs,
           const SumOverProcesses& sum, const BlockGradients& gradients)
      : passes_(passes), block_(block), s_(block.shape), state_(state), needs_(needs), sum_(sum), to_(gradients) {}

  void run(ConstData dy, ConstData x, ConstData projected, Data wide) {
    if (block_.by_channels) return by_channels(dy, x, projected, wide);
    Map input{x, block_.pixels_in(), s_.c_in};
    const double* shift = state_.expand.shift;
    if (block_.expand_uses_batch()) {
      input = centre(passes_, input, state_.input.mean, Slot::kCentred);
      shift = state_.expand.beta;  // behind a linear map whose input is centred
    }
    const ConstData d_project = project_norm(dy, projected);
    if (!needs_.before_project_norm()) return;
    passes_.set_block(s_, weights_of(block_, state_.expand.scale, shift));
    passes_.set_backward(block_.project.batch ? nullptr : state_.project.scale);
    const bool found = hidden_passes(input.data, d_project, wide);
    finish_project(found_.project);
    if (!found) return;
    const ConstData shortcut = s_.residual ? dy : nullptr;
    if (s_.has_expand) {
      linear_backward(passes_, block_.expand, block_.expand_matrix(), state_.expand, found_.expand, input, state_.input,
                      shortcut, sum_, to_.expand);
    } else if (to_.d_x && shortcut) {
      passes_.map_add({shortcut, input.pixels, s_.c_in}, to_.d_x);
    }
  }

 private:
  void by_channels(ConstData dy, ConstData x, ConstData projected, ConstData expanded) {
    const ConstData d_project = project_norm(dy, projected);
    if (!needs_.before_project_norm()) return;
    passes_.set_block(s_, weights_of(block_, nullptr, nullptr));
    passes_.set_backward(block_.project.batch ? nullptr : state_.project.scale);
    const auto sums = [this] { return NormSums{passes_.vector(s_.c_hidden), passes_.vector(s_.c_hidden)}; };
    const ChannelGradients found{.project = {to_.project.d_weight, sums()},
                                 .d_depthwise = to_.depthwise.d_weight,
                                 .d_expand = to_.expand.d_weight,
                                 .expand = sums(),
                                 .d_x = to_.d_x,
                                 .residual = s_.residual ? dy : nullptr};
    const bool deeper = needs_.before_depthwise_norm();
    passes_.backward_by_channels(x, expanded, d_project, state_.expand, state_.depthwise, deeper, found);
    finish_project(found.project);
    if (deeper) finish_norm(passes_, s_.c_hidden, state_.expand, found.expand, to_.expand);
  }

  // What the sums of the projection's backward say of its weight and of the depthwise norm.
  void finish_project(const ProjectGradients& found) {
    finish_norm(passes_, s_.c_hidden, state_.depthwise, found.sums, to_.depthwise);
    if (to_.project.d_weight && !block_.project.batch) {
      passes_.scale_rows(s_.c_out, s_.c_hidden, state_.project.scale, to_.project.d_weight);
    }
  }

  // The gradient of the projection's output, and those of gamma and beta of its norm. With fixed statistics the first
  // lacks the norm's scale, see Passes::set_backward().
  ConstData project_norm(ConstData dy, ConstData projected) {
    const Conv& project = block_.project;
    if (!needs_.project.gamma && !needs_.project.beta && !project.batch) return dy;
    const Map d_y{dy, block_.pixels_out(), s_.c_out};
    // Only statistics of the batch and gamma need the norm's input. For beta alone any map will do.
    const bool reads = needs_.project.gamma || project.batch;
    const NormSums sums{to_.project.d_beta, passes_.vector(s_.c_out)};
    passes_.map_products(d_y, reads ? projected : dy, state_.project.mean, sums);
    passes_.multiply(s_.c_out, sums.dy_centred, state_.project.rstd, to_.project.d_gamma);
    if (!project.batch) return dy;
    const BatchNormBackward backward = norm_backward(state_.project, s_.c_out, sums);
    const Data d_project = passes_.workspace(Slot::kDProject, d_y.pixels * s_.c_out);
    passes_.map_combine({.a = d_y,
                         .scale = backward.d_output,
                         .shift = backward.constant,
                         .b = projected,
                         .b_scale = backward.input,
                         .c = nullptr,
                         .out = d_project});
    return d_project;
  }

  // With the batch's statistics.
  BatchNormBackward norm_backward(const BatchNorm& norm, int64_t channels, const NormSums& sums) {
    const BatchNormBackward backward = new_backward(channels);
    const NormSums total = join_sums(passes_, channels, sums, sum_);
    const double count = sum_ ? passes_.load(state_.count_out) : static_cast<double>(block_.pixels_out());
    passes_.norm_backward(norm, channels, total.dy, total.dy_centred, count, backward);
    return backward;
  }

  BatchNormBackward new_backward(int64_t channels) {
    return BatchNormBackward::in(passes_.vector(BatchNormBackward::kVectors * channels), channels);
  }

  // The passes over hidden channels, to found_. Returns whether they went beyond the depthwise norm.
  //
  // With the batch's statistics the depthwise norm's backward needs sums over all pixels first, so there are two
  // passes. With fixed statistics there is one.
  bool hidden_passes(ConstData x, ConstData d_project, Data hidden) {
    const bool deeper = needs_.before_depthwise_norm(), one_pass = deeper && !block_.depthwise.batch;
    found_.with_project = one_pass;
    found_.project = {to_.project.d_weight, {passes_.vector(s_.c_hidden), passes_.vector(s_.c_hidden)}};
    const bool stores = deeper && !one_pass && block_.stores_hidden(), saved = hidden != nullptr;
    Data d_hidden = nullptr;
    if (!one_pass) {
      const int64_t size = passes_.hidden_size(s_);
      if (stores && !saved) hidden = passes_.workspace(Slot::kHidden, size);
      if (stores) d_hidden = passes_.workspace(Slot::kDHidden, size);
      passes_.project_backward(x, hidden, saved, d_hidden, d_project, state_.depthwise, found_.project);
    }
    if (!deeper) return false;
    BatchNormBackward backward;
    if (one_pass) {
      backward = new_backward(s_.c_hidden);
      passes_.norm_backward(state_.depthwise, s_.c_hidden, nullptr, nullptr, 1., backward);
    } else {
      backward = norm_backward(state_.depthwise, s_.c_hidden, found_.project.sums);
    }
    const int64_t taps = s_.c_hidden * s_.kernel * s_.kernel, folded = s_.c_hidden * s_.c_in;
    found_.d_depthwise = to_.depthwise.d_weight;
    if (!found_.d_depthwise) found_.d_depthwise = passes_.workspace(Slot::kMatrix, taps);
    const bool wants_expand = s_.has_expand && (block_.expand.batch || needs_.expand.weight || needs_.expand.gamma);
    found_.expand = {.d_x = to_.d_x,
                     .d_folded = wants_expand ? passes_.workspace(Slot::kGradient, folded) : nullptr,
                     .sum_dy = passes_.vector(s_.c_hidden),
                     .sum_dy_linear = passes_.vector(s_.c_hidden)};
    passes_.hidden_backward(x, hidden, d_hidden, d_project, state_.depthwise, backward, found_);
    return true;
  }

  Passes& passes_;
  const Block& block_;
  const BlockShape& s_;
  const BlockState& state_;
  const BlockNeeds& needs_;
  const SumOverProcesses& sum_;
  const BlockGradients& to_;
  HiddenGradients found_{};
};

}  // namespace

bool Block::stores_hidden() const {
  return recompute == Recompute::kLeast || (recompute == Recompute::kBalanced && shape.has_expand);
}

bool Block::saves_wide() const {
  if (by_channels) return recompute == Recompute::kLeast;
  const int64_t costs = shape.has_expand ? shape.c_in * shape.stride * shape.stride : 0;
  return depthwise.batch &&
         (recompute == Recompute::kLeast || (recompute == Recompute::kBalanced && costs >= kWorthSaving));
}

int64_t Block::saved_size(const Passes& passes) const {
  if (!saves_wide()) return 0;
  return by_channels ? passes.expanded_size(shape) : passes.hidden_size(shape);
}

int64_t BlockState::size(const Block& block) {
  const BlockShape& s = block.shape;
  return BatchNorm::kVectors * ((s.has_expand ? 2 : 1) * s.c_hidden + s.c_out) +
         (block.uses_moments() ? s.c_in * (1 + s.c_in) : 0) + 2;
}

BlockState BlockState::in(double* memory, const Block& block) {
  const BlockShape& s = block.shape;
  const auto take = [&memory](int64_t size) { return (memory += size) - size; };
  BlockState state{};
  state.input.count = take(1);
  state.count_out = take(1);
  if (s.has_expand) state.expand = BatchNorm::in(take(BatchNorm::kVectors * s.c_hidden), s.c_hidden);
  state.depthwise = BatchNorm::in(take(BatchNorm::kVectors * s.c_hidden), s.c_hidden);
  state.project = BatchNorm::in(take(BatchNorm::kVectors * s.c_out), s.c_out);
  if (block.uses_moments()) {
    state.input.mean = take(s.c_in);
    state.input.products = take(s.c_in * s.c_in);
  }
  return state;
}

void block_forward(Passes& passes, const Block& block, ConstData x, const SumOverProcesses& sum, Data y, Data projected,
                   Data wide, const BlockState& state) {
  const BlockShape& s = block.shape;
  const int64_t pixels = block.pixels_out();
  double count = 0.;
  Data hidden = block.by_channels ? nullptr : wide;
  if (!hidden && block.depthwise.batch && (block.by_channels || block.stores_hidden())) {
    hidden = passes.workspace(Slot::kHidden, passes.hidden_size(s));
  }
  Map input{x, block.pixels_in(), s.c_in};
  passes.fill(1, 0., state.input.count);
  if (block.by_channels) {
    passes.set_block(s, weights_of(block, nullptr, nullptr));
    passes.hidden_by_channels(x, block.expand, block.depthwise, wide, hidden, state.expand, state.depthwise);
    count = static_cast<double>(pixels);
  } else {
    const double* shift = state.expand.shift;
    if (block.expand_uses_batch()) {
      if (linear_norm(passes, block.expand, block.expand_matrix(), input, sum, state.input, state.expand)) {
        input = centre(passes, input, state.input.mean, Slot::kCentred);
        shift = state.expand.beta;
      }
    } else if (s.has_expand) {
      fixed_norm(passes, block.expand, s.c_hidden, state.expand);
    }
    passes.set_block(s, weights_of(block, state.expand.scale, shift));
    count = map_norm(passes, block.depthwise, pixels, s.c_hidden, sum, state.depthwise,
                     [&](double* mean, double* squares) { passes.hidden(input.data, hidden, mean, squares); });
  }
  passes.project(input.data, hidden, state.depthwise, projected);
  const Map out{projected, pixels, s.c_out};
  const double count_project = map_norm(passes, block.project, pixels, s.c_out, sum, state.project,
                                        [&](double* mean, double* squares) { passes.map_moments(out, mean, squares); });
  if (block.project.batch) count = count_project;
  passes.fill(1, count, state.count_out);
  passes.map_combine({.a = out,
                      .scale = state.project.scale,
                      .shift = state.project.shift,
                      .b = nullptr,
                      .b_scale = nullptr,
                      .c = s.residual ? x : nullptr,
                      .out = y});
}

void block_backward(Passes& passes, const Block& block, ConstData dy, ConstData x, ConstData projected, Data wide,
                    const BlockState& state, const BlockNeeds& needs, const SumOverProcesses& sum,
                    const BlockGradients& gradients) {
  Backward(passes, block, state, needs, sum, gradients).run(dy, x, projected, wide);
}

}  // namespace mnv2::train
