// Forward passes over hidden channels in training. Included once per ISA.
#pragma once

#include "moments-inl.h"
#include "train_chunk-inl.h"

namespace mnv2 {
namespace {

// Copies a tile into a wide map, past the caches if it would not stay in them.
void keep(const TrainTask& t, const float* tile, int64_t pixels, float* to) {
  if (!t.plan->streams) {
    return copy(tile, pixels * kChunk, to);
  }
  for (int64_t i = 0; i < pixels * kChunk; i += Vec::kLanes) Vec::load(tile + i).stream(to + i);
}

void hidden(const TrainTask& t) {
  const BlockShape& s = *t.shape;
  TrainScratch scratch(t);
  const int64_t height = h_out(s), width = w_out(s);
  const Strip start = strip_of(t, t.strips.first, height);
  const int64_t start_row = start.image * height + start.rows.first;
  for_each_strip(t, [&](int64_t i, int64_t number) {
    const Strip strip = strip_of(t, i, height);
    TrainChunk chunk(t, strip.image, number);
    scratch.ring.next = 0;
    for_each_tile(strip.rows, t.plan->rows, [&](Range rows) {
      const int64_t pixels = (rows.last - rows.first) * width;
      float* tile = scratch.tile[0];
      Ahead ahead = chunk.rows_to_keep(t.hidden, rows);
      chunk.forward.ahead = &ahead;
      scratch.ring.filter(chunk.forward, rows, -kInfinity, kInfinity, tile);
      const int64_t before = (strip.image * height + rows.first - start_row) * width;
      add_moments(tile, kChunk, pixels, chunk.vectors * Vec::kLanes, before, t.mean_hidden + chunk.channel,
                  t.squares_hidden + chunk.channel);
      if (t.hidden) keep(t, tile, pixels, t.hidden + chunk.at(rows.first));
    });
  });
  end_of_streams();
}

void project(const TrainTask& t) {
  const BlockShape& s = *t.shape;
  TrainScratch scratch(t);
  for_each_strip(t, [&](int64_t i, int64_t number) {
    const Strip strip = strip_of(t, i, h_out(s));
    TrainChunk chunk(t, strip.image, number);
    for_each_tile(strip.rows, t.plan->rows, [&](Range rows) {
      const int64_t pixels = (rows.last - rows.first) * w_out(s);
      Ahead ahead = chunk.wide_rows(t.hidden, {rows.last, rows.last + t.plan->rows}, strip.rows.last);
      chunk.forward.ahead = &ahead;
      chunk.activate(t.hidden + chunk.at(rows.first), pixels, scratch.tile[0]);
      float* out = t.out + (chunk.first_pixel + rows.first * w_out(s)) * s.c_out;
      chunk.forward.project(scratch.tile[0], pixels, add_to(out, number > t.chunks.first));
    });
  });
}

}  // namespace
}  // namespace mnv2
