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

// Every output row belongs to one strip, every chunk of hidden channels to one group. `groups` sets the order of sums,
// so it depends on the block's shape alone. The rest only sets who computes what, and when.
struct BlockPlan {
  int64_t rows;        // output rows that are filtered and projected at a time
  int64_t ring_rows;   // expanded rows kept for that
  int64_t ring_row;    // floats in an expanded row, zero columns included
  int64_t strips;      // per image
  int64_t groups;      // partial sums over the hidden channels, added in order
  int64_t group_sets;  // tasks that share the groups of one image
  int64_t scratch;     // floats of scratch a task needs
  int64_t shared;      // floats of scratch all tasks share (partial sums)
};

// `stem`: computes the block's input row by row; or null.
BlockPlan plan_block(const BlockShape& shape, DType dtype, const Machine& machine, const DenseShape* stem = nullptr);

// Output rows [first, last) of strip i; chunks [first, last) of group i.
struct Range {
  int64_t first, last;
};
static inline Range part(int64_t size, int64_t parts, int64_t i) { return {size * i / parts, size * (i + 1) / parts}; }

// Input rows that the output rows of a strip read.
static inline Range input_rows(const BlockShape& s, Range out) {
  const int64_t first = out.first * s.stride - s.pad.top;
  const int64_t last = (out.last - 1) * s.stride - s.pad.top + kernel_extent(s.kernel, s.dilation);
  const int64_t from = first < 0 ? 0 : first > s.h ? s.h : first;
  const int64_t to = last > s.h ? s.h : last;
  return {from, to < from ? from : to};
}

// Floats in an expanded row, zero columns included: an odd number of cache lines, so that the rows of a column do not
// fall into the same cache set.
static inline int64_t expanded_row(const BlockShape& s) {
  const int64_t row = round_up((s.w + s.pad.left + s.pad.right) * kChunk, kAlign);
  return row / kAlign % 2 == 0 ? row + kAlign : row;
}

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
