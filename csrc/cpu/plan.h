// How a block is cut into tasks on a CPU. A pure function of the shape and the machine.
#pragma once

#include "layout.h"
#include "storage.h"

namespace mnv2 {

struct Machine {
  Lanes lanes;
  int64_t l1, l2;  // bytes of data cache a core
  int64_t threads;

  bool operator==(const Machine&) const = default;
};

// Every output row belongs to one strip and every output column to one column strip; a task computes the pixels that
// are in both. Every chunk of hidden channels belongs to one group. `groups` sets the order of sums, so it depends on
// the block's shape alone. The rest only sets who computes what, and when.
struct BlockPlan {
  int64_t rows;        // output rows that are filtered and projected at a time
  int64_t ring_rows;   // expanded rows kept for that
  int64_t ring_row;    // floats in an expanded row, zero columns included
  int64_t strips;      // per image
  int64_t columns;     // column strips, per image
  int64_t groups;      // partial sums over the hidden channels, added in order
  int64_t group_sets;  // tasks that share the groups of one image
  int64_t scratch;     // floats of scratch a task needs
  int64_t shared;      // floats of scratch all tasks share (partial sums)
};

// `stem`: computes the block's input row by row; or null.
BlockPlan plan_block(const BlockShape& shape, DType dtype, const Machine& machine, const DenseShape* stem = nullptr);

// Output rows [first, last) of strip i; output columns of column strip i; chunks of group i.
struct Range {
  int64_t first, last;
};
static inline Range part(int64_t size, int64_t parts, int64_t i) { return {size * i / parts, size * (i + 1) / parts}; }

// Input positions [0, size) that the outputs of a range read along one axis.
static inline Range input_range(const BlockShape& s, Range out, int64_t pad, int64_t size) {
  const int64_t first = out.first * s.stride - pad;
  const int64_t last = (out.last - 1) * s.stride - pad + kernel_extent(s.kernel, s.dilation);
  const int64_t from = first < 0 ? 0 : first > size ? size : first;
  const int64_t to = last > size ? size : last;
  return {from, to < from ? from : to};
}

// Input rows or columns that neighbouring tiles both read, and expand.
static inline int64_t halo(const BlockShape& s) {
  const int64_t shared = kernel_extent(s.kernel, s.dilation) - s.stride;
  return shared < 0 ? 0 : shared;
}

// Input rows that the output rows of a strip read.
static inline Range input_rows(const BlockShape& s, Range out) { return input_range(s, out, s.pad.top, s.h); }

// The columns of a task.
struct Columns {
  Range out;
  Range in;      // of the input
  int64_t left;  // zero columns left of them
};

// Output columns `out`, the input columns that they read, and the zero columns that the first of them reads.
static inline Columns columns_of(const BlockShape& s, Range out) {
  const Range in = input_range(s, out, s.pad.left, s.w);
  const int64_t left = in.first - (out.first * s.stride - s.pad.left);
  return {out, in, in.first == in.last ? 0 : left};  // if no column is read, all are zeros
}
// The whole image, columns that no output reads included.
static inline Columns all_columns(const BlockShape& s) { return {{0, w_out(s)}, {0, s.w}, s.pad.left}; }

// Floats in an expanded row of `columns` columns: an odd number of cache lines, so that the rows of a column do not
// fall into the same cache set.
static inline int64_t expanded_row(int64_t columns) {
  const int64_t row = round_up(columns * kChunk, kAlign);
  return row / kAlign % 2 == 0 ? row + kAlign : row;
}
// Of the whole image, zero columns included.
static inline int64_t expanded_row(const BlockShape& s) { return expanded_row(s.w + s.pad.left + s.pad.right); }

// Floats in a row of the stem's input, zero columns included.
static inline int64_t stem_ring_row(const DenseShape& s) {
  return round_up((s.w + s.pad.left + s.pad.right) * s.c_in, kAlign);
}
// Floats of scratch for a window of the stem's input rows and a row of zeros.
static inline int64_t stem_window(const DenseShape& s) { return (s.kernel + 1) * stem_ring_row(s); }
static inline int64_t stem_scratch(const DenseShape& s, DType dtype) {
  return stem_window(s) + round_up(widened(dtype, w_out(s) * s.c_out), kAlign);
}

// In how many parts to cut each of n images to keep all threads busy: the fewest with at most 10 % idle.
int64_t parts_for_threads(int64_t n, int64_t threads, int64_t most);

}  // namespace mnv2
