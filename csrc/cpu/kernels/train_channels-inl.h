// Passes of training channel by channel: the expansion and its norm apart. Included once per ISA.
#pragma once

#include "moments-inl.h"
#include "train_chunk-inl.h"

namespace mnv2 {
namespace {

// Calls f(chunk, rows) for every tile of input rows.
template <class F>
void for_each_input_tile(const TrainTask& t, const F& f) {
  for_each_strip(t, [&](int64_t i, int64_t number) {
    const Strip strip = strip_of(t, i, t.shape->h);
    TrainChunk chunk(t, strip.image, number);
    for_each_tile(strip.rows, t.plan->input_rows, [&](Range rows) { f(chunk, rows); });
  });
}

void expand(const TrainTask& t) {
  const BlockShape& s = *t.shape;
  int64_t before = 0;
  for_each_input_tile(t, [&](const TrainChunk& chunk, Range rows) {
    const int64_t pixels = (rows.last - rows.first) * s.w;
    float* const tile = t.expanded + chunk.at_in(rows.first);
    chunk.forward.expand_alone(rows, tile);
    const int64_t channels = chunk.vectors * Vec::kLanes;
    for (int64_t p = 0; channels < kChunk && p < pixels; ++p) clear(tile + p * kChunk + channels, kChunk - channels);
    if (!t.mean_hidden) return;
    for (int64_t p = 0; p < pixels; p += kMapPixels) {
      const int64_t some = pixels - p < kMapPixels ? pixels - p : kMapPixels;
      add_moments(tile + p * kChunk, kChunk, some, channels, before, t.mean_hidden + chunk.channel,
                  t.squares_hidden + chunk.channel);
      before += some;
    }
  });
}

void normalise(const TrainTask& t) {
  const BlockShape& s = *t.shape;
  const Vec lo = Vec::broadcast(s.act.lo), hi = Vec::broadcast(s.act.hi);
  for_each_input_tile(t, [&](const TrainChunk& chunk, Range rows) {
    const float* const from = t.expanded + chunk.at_in(rows.first);
    const int64_t pixels = (rows.last - rows.first) * s.w, row = s.c_hidden;
    float* const to = t.out + (chunk.image * s.h + rows.first) * s.w * row + chunk.channel;
    for (int64_t lane = 0; lane < chunk.vectors * Vec::kLanes; lane += Vec::kLanes) {
      const int lanes = lanes_from(lane, chunk.forward.channels);
      const Vec scale = Vec::load(chunk.forward.scale + lane), shift = Vec::load(chunk.forward.shift + lane);
      for (int64_t p = 0; p < pixels; ++p) {
        store_lanes(clamp(fma(Vec::load(from + p * kChunk + lane), scale, shift), lo, hi), to + p * row + lane, lanes);
      }
    }
  });
}

void linear_backward(const TrainTask& t) {
  const BlockShape& s = *t.shape;
  const int64_t weights = s.c_in * kChunk;
  if (t.d_expand_weight) {
    clear(t.d_expand_weight + (t.chunks.first - t.first_chunk) * weights, (t.chunks.last - t.chunks.first) * weights);
  }
  for_each_input_tile(t, [&](const TrainChunk& chunk, Range rows) {
    const int64_t pixels = (rows.last - rows.first) * s.w;
    float* const d = t.d_expanded + chunk.at_in(rows.first);
    const float* const expanded = t.expanded + chunk.at_in(rows.first);
    chunk.norm_backward(d, expanded, pixels, d);
    if (t.d_expand_weight) chunk.add_expand_weight(rows, d);
  });
}

void input_gradient(const TrainTask& t) {
  const BlockShape& s = *t.shape;
  for_each_input_tile(t, [&](const TrainChunk& chunk, Range rows) {
    const int64_t at = (chunk.image * s.h + rows.first) * s.w * s.c_in;
    const bool last = chunk.number + 1 == t.chunks.last;
    Sum sum = add_to(t.out + at, chunk.number > t.chunks.first);
    sum.residual = last && t.residual ? t.residual + at : nullptr;
    chunk.backward.project(t.d_expanded + chunk.at_in(rows.first), (rows.last - rows.first) * s.w, sum);
  });
}

}  // namespace
}  // namespace mnv2
