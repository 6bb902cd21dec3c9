// The fused block: for each chunk of hidden channels, expand rows into a ring, filter them depthwise into a row
// buffer, project that onto the output. The expanded tensor exists only as the ring. Included once per ISA.
#pragma once

#include "hidden-inl.h"

namespace mnv2 {
namespace {

// Expands, filters and projects one chunk of hidden channels over the rows of the strip. `filtered`: (rows, w_out,
// kChunk).
void block_chunk(const BlockTask& t, const HiddenChunk& hidden, Ring& ring, float* filtered, const Sum& sum) {
  const BlockShape& s = *t.shape;
  ring.next = 0;
  for (int64_t first = t.rows.first; first < t.rows.last; first += t.plan->rows) {
    const Range rows{first, first + t.plan->rows < t.rows.last ? first + t.plan->rows : t.rows.last};
    ring.filter(hidden, rows, s.act.lo, s.act.hi, filtered);
    const int64_t offset = (rows.first - t.rows.first) * w_out(s) * s.c_out;
    hidden.project(filtered, (rows.last - rows.first) * w_out(s), sum.at(offset));
  }
}

void block(const BlockTask& t) {
  const BlockShape& s = *t.shape;
  const BlockPlan& p = *t.plan;
  const BlockLayout layout = block_layout(s.c_in, s.c_hidden, s.c_out, s.kernel, s.has_expand, kLanes);
  const Range input = input_rows(s, t.rows);
  const int64_t in_row = s.w * s.c_in, in_size = (input.last - input.first) * in_row;
  const int64_t out_row = w_out(s) * s.c_out, out_size = (t.rows.last - t.rows.first) * out_row;

  Buffers buffers{t.scratch};
  Ring ring(s, p.ring_rows, p.ring_row, buffers.take((p.ring_rows + 1) * p.ring_row));
  float* const filtered = buffers.take(p.rows * w_out(s) * kChunk);
  const float* x = nullptr;
  float* window_rows = nullptr;
  if (t.stem) {
    window_rows = buffers.take(stem_window(*t.stem->shape));
  } else {
    x = read(at(t.x, input.first * in_row), in_size, buffers.take(widened(t.x.dtype, in_size)));
  }
  const Draft y(at(t.y, t.rows.first * out_row), buffers.take(t.partial ? 0 : widened(t.y.dtype, out_size)));
  const float* residual = s.residual && !t.partial ? x + (t.rows.first - input.first) * in_row : nullptr;
  float* const rest = !t.partial && p.groups > 1 ? buffers.take(out_size) : nullptr;

  // The sum is ((first group + x) + second group) + ..., each group's chunks added up in order. If it is clamped, x
  // comes last.
  const bool clamps = s.out != kNoActivation;
  for (int64_t g = t.groups.first; g < t.groups.last; ++g) {
    const Range chunks = part(layout.chunks, p.groups, g);
    float* target = g == 0 ? y.data : rest;
    if (t.partial) target = t.partial + g * h_out(s) * out_row + t.rows.first * out_row;
    for (int64_t c = chunks.first; c < chunks.last; ++c) {
      HiddenChunk hidden(s, t.packed, c);
      Sum sum{.to = target,
              .from = c > chunks.first ? target : nullptr,
              .residual = nullptr,
              .bias = g == 0 ? weights_of(t.packed) : nullptr};
      if (c + 1 == chunks.last) {
        if (g == 0 && !clamps) sum.residual = residual;
        if (rest && target == rest) sum.to = y.data, sum.residual = y.data;
        if (clamps && !t.partial && g + 1 == p.groups) sum.act = &s.out, sum.shortcut = residual;
      }
      StemWindow window(t.stem, window_rows);
      Ahead ahead{hidden.weights + layout.chunk, layout.chunk};
      hidden.x = x;
      hidden.x_first = input.first;
      hidden.window = t.stem ? &window : nullptr;
      hidden.ahead = &ahead;
      block_chunk(t, hidden, ring, filtered, sum);
    }
  }
  if (!t.partial) y.finish(out_size);
}

void reduce(const ReduceTask& t) {
  const BlockShape& s = *t.shape;
  const int64_t image = h_out(s) * w_out(s) * s.c_out, end = t.pixels.last * s.c_out;
  constexpr int64_t kStep = 512;
  float wide[kStep], sum[kStep];
  const bool clamps = s.out != kNoActivation;
  const Vec lo = Vec::broadcast(s.out.lo), hi = Vec::broadcast(s.out.hi);
  for (int64_t i = t.pixels.first * s.c_out; i < end; i += kStep) {
    const int64_t count = end - i < kStep ? end - i : kStep;
    const float* x = s.residual ? read(at(t.x, i), count, wide) : nullptr;
    const Draft y(at(t.y, i), sum);
    for (int64_t j = 0; j < count; j += Vec::kLanes) {
      const int lanes = lanes_from(j, count);
      Vec v = load_lanes(t.partial + i + j, lanes);
      if (s.residual && !clamps) v = add(v, load_lanes(x + j, lanes));
      for (int64_t g = 1; g < t.plan->groups; ++g) v = add(v, load_lanes(t.partial + g * image + i + j, lanes));
      if (clamps) {
        v = clamp(v, lo, hi);
        if (s.residual) v = add(v, load_lanes(x + j, lanes));
      }
      store_lanes(v, y.data + j, lanes);
    }
    y.finish(count);
  }
}

}  // namespace
}  // namespace mnv2
