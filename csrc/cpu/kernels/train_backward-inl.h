// Backward passes over hidden channels. Included once per ISA.
#pragma once

#include "maps-inl.h"
#include "train_chunk-inl.h"
#include "train_depthwise-inl.h"

namespace mnv2 {
namespace {

// Clears the sums that the projection's backward adds to.
void clear_projection(const TrainTask& t) {
  const int64_t weights = t.shape->c_out * kChunk;
  for (int64_t i = t.chunks.first; i < t.chunks.last; ++i) {
    if (t.d_project_weight) clear(t.d_project_weight + (i - t.first_chunk) * weights, weights);
    for (int64_t c = i * kChunk; c < (i + 1) * kChunk; ++c) t.sum_dy[c] = t.sum_dy_centred[c] = 0.;
  }
}

void project_backward(const TrainTask& t) {
  const BlockShape& s = *t.shape;
  TrainScratch scratch(t);
  clear_projection(t);
  for_each_strip(t, [&](int64_t i, int64_t number) {
    const Strip strip = strip_of(t, i, h_out(s));
    TrainChunk chunk(t, strip.image, number);
    scratch.ring.next = 0;
    for_each_tile(strip.rows, t.plan->rows, [&](Range rows) {
      Ahead ahead[] = {chunk.rows_to_keep(t.hidden, rows), chunk.rows_to_keep(t.d_hidden, rows)};
      chunk.forward.ahead = &ahead[0];
      chunk.backward.ahead = &ahead[1];
      const float* hidden = t.hidden_kept ? t.hidden + chunk.at(rows.first) : scratch.tile[0];
      if (!t.hidden_kept) scratch.ring.filter(chunk.forward, rows, -kInfinity, kInfinity, scratch.tile[0]);
      if (t.d_project_weight) chunk.add_project_weight(rows, hidden, scratch.tile[1]);
      chunk.project_to_hidden(rows, hidden, scratch.tile[2], true,
                              {.hidden = t.hidden && !t.hidden_kept ? t.hidden + chunk.at(rows.first) : nullptr,
                               .d_hidden = t.d_hidden ? t.d_hidden + chunk.at(rows.first) : nullptr});
    });
  });
  end_of_streams();
}

// Clears the sums of hidden_backward().
void clear_hidden(const TrainTask& t) {
  const BlockShape& s = *t.shape;
  const int64_t taps = s.kernel * s.kernel * kChunk, weights = s.c_in * kChunk;
  for (int64_t i = t.chunks.first; i < t.chunks.last; ++i) {
    const int64_t own = i - t.first_chunk;
    if (t.d_depthwise_weight) clear(t.d_depthwise_weight + own * taps, taps);
    if (t.d_expand_weight) clear(t.d_expand_weight + own * weights, weights);
    for (int64_t c = i * kChunk; c < (i + 1) * kChunk; ++c) t.sum_d_expand[c] = t.sum_d_expand_linear[c] = 0.;
  }
  if (t.sum_dy) clear_projection(t);
}

// The backward of a dense convolution's clamp: `a` (pixels, kChunk), its output, becomes d_expand. Adds to the sums.
void clip_dense(const TrainChunk& chunk, const float* d_out, int64_t pixels, float* a, ExpandSums& sums) {
  const BlockShape& s = *chunk.t.shape;
  const Vec lo = Vec::broadcast(s.act.lo), hi = Vec::broadcast(s.act.hi);
  for (int64_t v = 0; v < chunk.vectors; ++v) {
    const int64_t lane = v * Vec::kLanes;
    const int lanes = lanes_from(lane, chunk.forward.channels);
    const Vec shift = Vec::load(sums.shift + lane);
    Vec total = Vec::load(sums.d_expand + lane), linear = Vec::load(sums.linear + lane);
    for (int64_t pixel = 0; pixel < pixels; ++pixel) {
      float* at = a + pixel * kChunk + lane;
      const Vec dy = load_lanes(d_out + pixel * s.c_hidden + chunk.channel + lane, lanes);
      const Vec value = Vec::load(at), clipped = inside(value, lo, hi, dy);
      total = add(total, clipped);
      linear = fma(clipped, sub(value, shift), linear);
      clipped.store(at);
    }
    total.store(sums.d_expand + lane);
    linear.store(sums.linear + lane);
  }
}

// The expansion's backward of input rows `rows`: adds x' d_expand to the weight's gradient, and the chunk's part of the
// gradient of x to t.out. Without an expansion d_expand is that gradient.
void expand_backward(const TrainChunk& chunk, bool first_chunk, Range rows, const float* d_expand) {
  const TrainTask& t = chunk.t;
  const BlockShape& s = *t.shape;
  if (t.d_expand_weight) chunk.add_expand_weight(rows, d_expand);
  if (!t.out) return;
  const int64_t pixels = (rows.last - rows.first) * s.w;
  float* out = t.out + (chunk.image * s.h + rows.first) * s.w * s.c_in;
  if (s.has_expand) return chunk.backward.project(d_expand, pixels, add_to(out, !first_chunk));
  for (int64_t p = 0; p < pixels; ++p) {
    for (int64_t c = 0; c < chunk.forward.channels; ++c) {
      out[p * s.c_in + chunk.channel + c] = d_expand[p * kChunk + c];
    }
  }
}

// Keeps d_expand of input rows `rows`, and adds to its sums and to those of its products with the centred expansion.
void keep_expanded(const TrainChunk& chunk, Range rows, const float* d_expand, double* const sums[2]) {
  const TrainTask& t = chunk.t;
  const int64_t pixels = (rows.last - rows.first) * t.shape->w, channels = chunk.vectors * Vec::kLanes;
  float* const to = t.d_expanded + chunk.at_in(rows.first);
  const float *const expanded = t.expanded + chunk.at_in(rows.first), *const mean = t.expand_mean + chunk.channel;
  for (int64_t p = 0; p < pixels; p += kMapPixels) {
    const int64_t some = pixels - p < kMapPixels ? pixels - p : kMapPixels;
    add_products(d_expand + p * kChunk, expanded + p * kChunk, kChunk, mean, some, channels, sums);
    copy(d_expand + p * kChunk, some * kChunk, to + p * kChunk);
  }
}

void hidden_backward(const TrainTask& t) {
  const BlockShape& s = *t.shape;
  TrainScratch scratch(t);
  clear_hidden(t);
  for_each_strip(t, [&](int64_t i, int64_t number) {
    const Strip strip = strip_of(t, i, s.h);
    TrainChunk chunk(t, strip.image, number);
    ExpandSums sums{};
    if (s.has_expand) chunk.expand_bias(sums.shift);
    const bool dense = t.d_out != nullptr;
    DepthwiseBackward depthwise(chunk, scratch, dense ? Range{0, 0} : strip.rows,
                                dense ? Range{0, 0} : strip_of(t, i, h_out(s)).rows);
    for_each_tile(strip.rows, t.plan->input_rows, [&](Range rows) {
      float* a = scratch.tile[0];
      const int64_t pixels = (rows.last - rows.first) * s.w, pixel = (strip.image * s.h + rows.first) * s.w;
      const Range next = output_rows(s, {rows.last, rows.last + t.plan->input_rows});
      Ahead ahead[] = {chunk.wide_rows(t.hidden, next, next.last), chunk.wide_rows(t.d_hidden, next, next.last)};
      chunk.forward.ahead = &ahead[0];
      chunk.backward.ahead = &ahead[1];
      depthwise.expand(rows, a);
      clear(sums.d_expand, kChunk);
      clear(sums.linear, kChunk);
      if (dense) {
        clip_dense(chunk, t.d_out + pixel * s.c_hidden, pixels, a, sums);
      } else {
        depthwise(rows, a, sums);
      }
      if (t.d_expanded) {
        double* const totals[] = {t.sum_d_expand + chunk.channel, t.sum_d_expand_linear + chunk.channel};
        keep_expanded(chunk, rows, a, totals);
        return;
      }
      for (int64_t c = 0; c < kChunk; ++c) {
        t.sum_d_expand[chunk.channel + c] += sums.d_expand[c];
        t.sum_d_expand_linear[chunk.channel + c] += sums.linear[c];
      }
      expand_backward(chunk, number == t.chunks.first, rows, a);
    });
  });
}

}  // namespace
}  // namespace mnv2
