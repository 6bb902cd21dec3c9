// Backward of the depthwise convolution and of its norm for one chunk. Included once per ISA.
#pragma once

#include "depthwise_backward-inl.h"
#include "train_chunk-inl.h"

namespace mnv2 {
namespace {

// The smallest range that holds both.
Range join(Range a, Range b) {
  if (a.first == a.last) return b;
  return {a.first < b.first ? a.first : b.first, a.last > b.last ? a.last : b.last};
}

// Sums over the pixels of a tile, see TrainTask: of d_expand, and of d_expand * (expanded - shift). (kChunk) each.
struct ExpandSums {
  float d_expand[kChunk], linear[kChunk];
  float shift[kChunk];
};

// The backward through the depthwise convolution over one strip of input rows, from its top downwards.
class DepthwiseBackward {
 public:
  // `own`: the output rows that count in this strip's sums.
  DepthwiseBackward(const TrainChunk& chunk, TrainScratch& scratch, Range strip, Range own)
      : chunk_(chunk), scratch_(scratch), hidden_(chunk.t.hidden), d_hidden_(chunk.t.d_hidden) {
    const Range touched = output_rows(*chunk.t.shape, strip);
    start_ = next_ = touched.first;
    if (hidden_) hidden_ += chunk.at(touched.first);
    if (d_hidden_) {
      d_hidden_ += chunk.at(touched.first);
    } else {
      recompute(touched, own);
    }
  }

  // Copies or recomputes the convolution's input, rows [rows.first, rows.last), into `a` (rows, w, kChunk).
  void expand(Range rows, float* a) const {
    const int64_t size = chunk_.t.shape->w * kChunk;
    if (rows.first < expanded_.first || rows.last > expanded_.last) {
      return chunk_.forward.expand(rows, {a, rows.last - rows.first, size, rows.first});
    }
    for (int64_t row = rows.first; row < rows.last; ++row, a += size) {
      copy(scratch_.ring.rows[row], size, a);
    }
  }

  // `a` (rows, w, kChunk), the convolution's input, becomes d_expand. Adds to its sums, and the filter's gradient to
  // the task's.
  void operator()(Range rows, float* a, ExpandSums& sums) {
    const BlockShape& s = *chunk_.t.shape;
    const int64_t width = w_out(s), last = output_rows(s, rows).last, taps = s.kernel * s.kernel * kChunk;
    for (; next_ < last; ++next_) {
      const int64_t at = (next_ - start_) * width * kChunk;
      chunk_.norm_backward(d_hidden_ + at, hidden_ + at, width, scratch_.d_depthwise[next_]);
    }
    clear(scratch_.taps, taps);  // long sums in parts
    for (int64_t row = rows.first; row < rows.last; ++row) {
      filter_row(row, a + (row - rows.first) * s.w * kChunk, sums);
    }
    float* const d_weight = chunk_.t.d_depthwise_weight + chunk_.own * s.kernel * s.kernel;
    for (int64_t k = 0; k < taps; k += Vec::kLanes) {
      add(Vec::load(d_weight + k), Vec::load(scratch_.taps + k)).store(d_weight + k);
    }
  }

 private:
  // Computes the rows of d_hidden, and of `hidden` unless it has been kept, that the strip touches. If the task wants
  // the projection's sums, also its own rows, which alone count in them; the others count in another strip.
  void recompute(Range touched, Range own) {
    const TrainTask& t = chunk_.t;
    const BlockShape& s = *t.shape;
    const Range all = t.sum_dy ? join(touched, own) : touched;
    const int64_t size = w_out(s) * kChunk;
    const auto hidden = [&](int64_t row) { return scratch_.strip[0] + (row - all.first) * size; };
    const auto d_hidden = [&](int64_t row) { return scratch_.strip[1] + (row - all.first) * size; };
    scratch_.ring.next = 0;
    const auto compute = [&](Range some, bool counts) {
      for_each_tile(some, t.plan->rows, [&](Range rows) {
        const float* from = t.hidden ? t.hidden + chunk_.at(rows.first) : hidden(rows.first);
        if (!t.hidden) scratch_.ring.filter(chunk_.forward, rows, -kInfinity, kInfinity, hidden(rows.first));
        if (counts && t.d_project_weight) chunk_.add_project_weight(rows, from, scratch_.tile[1]);
        chunk_.project_to_hidden(rows, from, d_hidden(rows.first), counts, {nullptr, nullptr});
      });
    };
    if (t.sum_dy) {
      compute({all.first, own.first}, false);
      compute(own, true);
      compute({own.last, all.last}, false);
    } else {
      compute(all, false);
    }
    d_hidden_ = d_hidden(touched.first);
    if (t.hidden) return;
    hidden_ = hidden(touched.first);
    const bool gaps = s.stride > kernel_extent(s.kernel, s.dilation);  // between the rows that are read
    if (s.has_expand && !gaps) expanded_ = {input_rows(s, all).first, scratch_.ring.next};
  }

  // One input row `a`.
  void filter_row(int64_t row, float* a, ExpandSums& sums) {
    const BlockShape& s = *chunk_.t.shape;
    const float* readers[kMostKernel];
    for (int64_t ky = 0; ky < s.kernel; ++ky) {
      const int64_t at = row + s.pad.top - ky * s.dilation;
      const bool read = at >= 0 && at % s.stride == 0 && at / s.stride < h_out(s);
      readers[ky] = read ? scratch_.d_depthwise[at / s.stride] : scratch_.zeros;
    }
    depthwise_backward_row({.rows = readers,
                            .first_ky = (row + s.pad.top) % s.stride,
                            .a = a,
                            .weights = chunk_.forward.weights + chunk_.forward.offsets.depthwise,
                            .d_weight = scratch_.taps,
                            .sum_dx = sums.d_expand,
                            .shift = sums.shift,
                            .sum_dx_linear = sums.linear,
                            .w = s.w,
                            .w_out = w_out(s),
                            .vectors = chunk_.vectors,
                            .kernel = s.kernel,
                            .stride = s.stride,
                            .dilation = s.dilation,
                            .pad_left = s.pad.left,
                            .mask = s.has_expand,
                            .lo = s.act.lo,
                            .hi = s.act.hi});
  }

  const TrainChunk& chunk_;
  TrainScratch& scratch_;
  const float *hidden_, *d_hidden_;  // from output row start_ on
  int64_t start_, next_;             // next_: the first row whose depthwise gradient has not been computed
  Range expanded_{0, 0};             // input rows that are still in the ring
};

}  // namespace
}  // namespace mnv2
