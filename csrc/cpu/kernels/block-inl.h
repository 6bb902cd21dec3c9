// The fused block: for each chunk of hidden channels, expand rows into a ring, filter them depthwise into a row
// buffer, project that onto the output. The expanded tensor exists only as the ring. Included once per ISA.
#pragma once

#include "hidden-inl.h"

namespace mnv2 {
namespace {

// Expands, filters and projects one chunk of hidden channels over the task's pixels. `filtered`: (rows, columns,
// kChunk). `row`: floats from one row of the sum's maps to the next.
void block_chunk(const BlockTask& t, const HiddenChunk& hidden, Ring& ring, float* filtered, const Sum& sum,
                 int64_t row) {
  const BlockShape& s = *t.shape;
  const int64_t width = t.columns.last - t.columns.first;
  ring.next = 0;
  for (int64_t first = t.rows.first; first < t.rows.last; first += t.plan->rows) {
    const Range rows{first, first + t.plan->rows < t.rows.last ? first + t.plan->rows : t.rows.last};
    ring.filter(hidden, rows, s.act.lo, s.act.hi, filtered);
    // Rows that follow one another without a gap are one long row.
    const int64_t step = row == width * s.c_out ? rows.last - rows.first : 1;
    for (int64_t i = rows.first; i < rows.last; i += step) {
      hidden.project(filtered + (i - rows.first) * width * kChunk, step * width, sum.at((i - t.rows.first) * row));
    }
  }
}

void block(const BlockTask& t) {
  const BlockShape& s = *t.shape;
  const BlockPlan& p = *t.plan;
  const BlockLayout layout = block_layout(s.c_in, s.c_hidden, s.c_out, s.kernel, s.has_expand, kLanes);
  const Range input = input_rows(s, t.rows);
  const Columns columns = p.columns == 1 ? all_columns(s) : columns_of(s, t.columns);
  const int64_t rows = t.rows.last - t.rows.first, width = t.columns.last - t.columns.first;
  const int64_t in_row = s.w * s.c_in, out_row = w_out(s) * s.c_out;
  const int64_t in_rows = input.last - input.first, in_width = columns.in.last - columns.in.first;

  Buffers buffers{t.scratch};
  Ring ring(columns, p.ring_rows, p.ring_row, buffers.take((p.ring_rows + 1) * p.ring_row));
  float* const filtered = buffers.take(p.rows * width * kChunk);
  ReadRows x{};
  float* window_rows = nullptr;
  if (t.stem) {
    window_rows = buffers.take(stem_window(*t.stem->shape));
  } else {
    x = read_rows(at(t.x, input.first * in_row + columns.in.first * s.c_in), in_row, in_rows, in_width * s.c_in,
                  buffers.take(widened(t.x.dtype, in_rows * in_width * s.c_in)));
  }
  // All maps that the sums are formed in have rows of the same length: with a residual, that of x.
  const int64_t draft_row = s.residual ? in_width * s.c_in : width * s.c_out;
  const Draft y(at(t.y, t.rows.first * out_row + t.columns.first * s.c_out), out_row,
                buffers.take(t.partial ? 0 : widened(t.y.dtype, rows * draft_row)), draft_row);
  const float* residual = nullptr;
  if (s.residual && !t.partial) {
    residual = x.data + (t.rows.first - input.first) * x.row + (t.columns.first - columns.in.first) * s.c_in;
  }
  float* const rest = !t.partial && p.groups > 1 ? buffers.take(rows * y.row) : nullptr;

  // The sum is ((first group + x) + second group) + ..., each group's chunks added up in order. If it is clamped, x
  // comes last.
  const bool clamps = s.out != kNoActivation;
  for (int64_t g = t.groups.first; g < t.groups.last; ++g) {
    const Range chunks = part(layout.chunks, p.groups, g);
    float* target = g == 0 ? y.data : rest;
    if (t.partial) target = t.partial + (g * h_out(s) + t.rows.first) * out_row + t.columns.first * s.c_out;
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
      hidden.x = x.data;
      hidden.x_first = input.first;
      hidden.x_row = x.row;
      hidden.columns = columns.in;
      hidden.window = t.stem ? &window : nullptr;
      hidden.ahead = &ahead;
      block_chunk(t, hidden, ring, filtered, sum, t.partial ? out_row : y.row);
    }
  }
  if (!t.partial) y.finish(width * s.c_out, rows);
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
