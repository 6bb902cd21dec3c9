// How a block's training passes are cut into tasks on a CPU. Pure functions of the shape and the machine's caches. Sums
// are formed part by part, so nothing here may depend on the number of threads.
#pragma once

#include "plan.h"

namespace mnv2 {

// Images are cut into strips of rows; consecutive strips of all images form a part, consecutive chunks a group. A task
// takes one part and one group.
struct TrainPlan {
  int64_t strips;                       // per image
  int64_t parts;                        // of the strips of all images
  int64_t groups;                       // of the chunks
  int64_t rows;                         // output rows at a time
  int64_t input_rows;                   // input rows at a time, in the backward pass
  int64_t ring_rows, ring_row;          // expanded rows kept, for `rows` or for a strip; floats in one
  int64_t gradient_rows, gradient_row;  // the same for the depthwise output's gradient, for `input_rows`
  int64_t tile;                         // floats in the rows at a time
  int64_t strip;                        // floats in the output rows that the input rows of a strip touch
  bool streams;                         // wide maps do not stay in the caches
  bool chunk_by_chunk;                  // a task does all its strips for one chunk before the next
  int64_t scratch;                      // floats of scratch a task needs
};

constexpr int64_t kGradientColumns = 2;  // zero columns on either side of a row of the depthwise output's gradient

// `both_ways`: hidden_backward recomputes a strip's wide rows and keeps its expanded rows for their backward. The
// strips are the same either way, and so is the order of sums.
TrainPlan plan_train(const BlockShape& shape, const Machine& machine, bool both_ways);

// Channel by channel, see train_channels.cpp: strips are whole images, and parts are counted for each chunk.
TrainPlan plan_channels(const BlockShape& shape, const Machine& machine);

// Output rows that read input rows [in.first, in.last).
static inline Range output_rows(const BlockShape& s, Range in) {
  const int64_t first = divide_up(in.first + s.pad.top - kernel_extent(s.kernel, s.dilation) + 1, s.stride);
  const int64_t last = (in.last - 1 + s.pad.top) / s.stride + 1, height = h_out(s);
  const int64_t from = in.first + s.pad.top < kernel_extent(s.kernel, s.dilation) ? 0 : first < height ? first : height;
  const int64_t to = last < height ? last : height;
  return {from, to < from ? from : to};
}

// The block from d_project to the gradient of x; see TrainTask.
static inline BlockShape backward_shape(const BlockShape& s) {
  BlockShape b = s;
  b.h = h_out(s);
  b.w = w_out(s);
  b.c_in = s.c_out;
  b.c_out = s.c_in;
  b.has_expand = true;
  b.residual = false;
  b.act = kNoActivation;
  return b;
}

constexpr int64_t kMapPixels = 16;       // of a narrow map, summed in fp32
constexpr int64_t kMomentsPixels = 512;  // at a time
constexpr int64_t kExactPixels = 64;     // at a time, in fp64: at most twice as wide, rows of at most twice the length
static inline int64_t moments_row(int64_t channels, Lanes l) { return round_up(channels, l.lanes); }
static inline int64_t moments_scratch(int64_t channels, Lanes l) {
  const int64_t row = moments_row(channels, l);
  return round_up((kMomentsPixels + row + 4) * row, kAlign);
}

constexpr int64_t kInputGradientPixels = 64;  // at a time
static inline int64_t input_gradient_scratch(int64_t channels) {
  return round_up(kInputGradientPixels * (channels + 1), kAlign);
}

}  // namespace mnv2
