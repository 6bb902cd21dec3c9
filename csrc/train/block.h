// An inverted-residual block in training: the order of its passes. docs/training.md has the mathematics.
#pragma once

#include "linear.h"

namespace mnv2::train {

// What the backward recomputes instead of reading it from memory.
enum class Recompute { kMost, kBalanced, kLeast };

// Multiply-adds that recomputing a depthwise output must cost for kBalanced to save it until the backward.
constexpr int64_t kWorthSaving = 128;

struct Block {
  BlockShape shape;
  Conv expand, depthwise, project;  // expand: unused without an expansion
  Recompute recompute;
  bool by_channels;  // see Passes

  Matrix expand_matrix() const { return {expand.weight, shape.c_hidden, shape.c_in}; }
  int64_t pixels_in() const { return shape.n * shape.h * shape.w; }
  int64_t pixels_out() const { return shape.n * h_out(shape) * w_out(shape); }
  bool expand_uses_batch() const { return shape.has_expand && expand.batch; }
  // Whether the first norm's statistics come from moments of the input.
  bool uses_moments() const { return expand_uses_batch() && !by_channels; }
  // Whether hidden maps are in memory between the passes of the forward, and of the backward. Without an expansion,
  // recomputing them is faster.
  bool stores_hidden() const;
  // Whether the depthwise outputs or, channel by channel, the expansion's are saved from the forward to the backward.
  // With fixed statistics of the depthwise norm none are: forward and backward are then one pass each.
  bool saves_wide() const;
  int64_t saved_size(const Passes& passes) const;
};

// What the forward tells the backward besides maps, in one piece of memory of float64 numbers.
struct BlockState {
  BatchNorm expand, depthwise, project;  // expand: null without an expansion
  Moments input;                         // mean, products: null unless the block uses moments
  double* count_out;                     // pixels of the output of all processes

  static int64_t size(const Block& block);
  static BlockState in(double* memory, const Block& block);
};

// y and `projected`, the projection's output, may be the same. wide: where what saves_wide() says is saved; or null.
void block_forward(Passes& passes, const Block& block, ConstData x, const SumOverProcesses& sum, Data y, Data projected,
                   Data wide, const BlockState& state);

struct BlockNeeds {
  bool x;
  Needs expand, depthwise, project;

  // Whether the backward reaches what comes before the depthwise norm.
  bool before_depthwise_norm() const { return x || expand.any() || depthwise.weight; }
  bool before_project_norm() const {
    return before_depthwise_norm() || depthwise.gamma || depthwise.beta || project.weight;
  }
};

struct BlockGradients {
  Data d_x;  // null if not wanted
  ConvGradients expand, depthwise, project;
};

// dy: the gradient of y. projected: null if neither gamma nor statistics of the projection's norm need it. wide: null
// unless saved.
void block_backward(Passes& passes, const Block& block, ConstData dy, ConstData x, ConstData projected, Data wide,
                    const BlockState& state, const BlockNeeds& needs, const SumOverProcesses& sum,
                    const BlockGradients& gradients);

}  // namespace mnv2::train
