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
  const int64_t out_row = w_out(s) * s.c_out, size = (t.rows.last - t.rows.first) * out_row;
  const int64_t in_row = s.w * s.c_in, in_rows = input.last - input.first;
  const bool fp32 = t.dtype == DType::kFloat32;

  float* free = t.scratch;
  auto take = [&free](int64_t count) {
    float* taken = free;
    free += round_up(count, kAlign);
    return taken;
  };
  Ring ring(s, p.ring_rows, p.ring_row, take((p.ring_rows + 1) * p.ring_row));
  float* filtered = take(p.rows * w_out(s) * kChunk);

  const float* x = nullptr;
  float* window_rows = nullptr;
  if (t.stem) {
    window_rows = take(stem_window(*t.stem->shape));
  } else if (fp32) {
    x = static_cast<const float*>(t.x) + input.first * in_row;
  } else {
    float* wide = take(in_rows * in_row);
    widen(t.dtype, static_cast<const uint16_t*>(t.x) + input.first * in_row, wide, in_rows * in_row);
    x = wide;
  }
  float* y = nullptr;
  if (!t.partial) y = fp32 ? static_cast<float*>(t.y) + t.rows.first * out_row : take(size);
  const float* residual = s.residual && !t.partial ? x + (t.rows.first - input.first) * in_row : nullptr;
  float* rest = !t.partial && p.groups > 1 ? take(size) : nullptr;

  // The sum is ((first group + x) + second group) + ..., each group's chunks added up in order.
  for (int64_t g = t.groups.first; g < t.groups.last; ++g) {
    const Range chunks = part(layout.chunks, p.groups, g);
    float* target = t.partial ? t.partial + g * h_out(s) * out_row + t.rows.first * out_row : g == 0 ? y : rest;
    for (int64_t c = chunks.first; c < chunks.last; ++c) {
      const bool last = c + 1 == chunks.last;
      Sum sum{target, c > chunks.first ? target : nullptr, nullptr, g == 0 ? t.packed : nullptr};
      if (last && g == 0) sum.residual = residual;
      if (last && target == rest && rest) sum.to = y, sum.residual = y;
      StemWindow window(t.stem, window_rows);
      HiddenChunk hidden(s, t.packed, c);
      Ahead ahead{hidden.weights + layout.chunk, layout.chunk};
      hidden.x = x;
      hidden.x_first = input.first;
      hidden.window = t.stem ? &window : nullptr;
      hidden.ahead = &ahead;
      block_chunk(t, hidden, ring, filtered, sum);
    }
  }
  if (t.partial) return;
  if (!fp32) narrow(t.dtype, y, static_cast<uint16_t*>(t.y) + t.rows.first * out_row, size);
}

void reduce(const ReduceTask& t) {
  const BlockShape& s = *t.shape;
  const bool fp32 = t.dtype == DType::kFloat32;
  const int64_t image = h_out(s) * w_out(s) * s.c_out, end = t.pixels.last * s.c_out;
  constexpr int64_t kStep = 512;
  float wide[kStep], sum[kStep];
  for (int64_t i = t.pixels.first * s.c_out; i < end; i += kStep) {
    const int64_t count = end - i < kStep ? end - i : kStep;
    const float* x = wide;
    if (s.residual && fp32) x = static_cast<const float*>(t.x) + i;
    if (s.residual && !fp32) widen(t.dtype, static_cast<const uint16_t*>(t.x) + i, wide, count);
    float* y = fp32 ? static_cast<float*>(t.y) + i : sum;
    for (int64_t j = 0; j < count; j += Vec::kLanes) {
      const int lanes = static_cast<int>(count - j < Vec::kLanes ? count - j : Vec::kLanes);
      const auto load = [lanes, j](const float* p) {
        return lanes == Vec::kLanes ? Vec::load(p + j) : Vec::load_first(p + j, lanes);
      };
      Vec v = load(t.partial + i);
      if (s.residual) v = add(v, load(x));
      for (int64_t g = 1; g < t.plan->groups; ++g) v = add(v, load(t.partial + g * image + i));
      lanes == Vec::kLanes ? v.store(y + j) : v.store_first(y + j, lanes);
    }
    if (!fp32) narrow(t.dtype, y, static_cast<uint16_t*>(t.y) + i, count);
  }
}

}  // namespace
}  // namespace mnv2
