// Shared by the training passes over hidden channels: strips, scratch memory, one chunk of one image. Included once per
// ISA.
#pragma once

#include "accumulate-inl.h"
#include "hidden-inl.h"
#include "tasks.h"

namespace mnv2 {
namespace {

// Rows of an image.
struct Strip {
  int64_t image;
  Range rows;
};

// Strip i of the batch, of images `height` rows high.
Strip strip_of(const TrainTask& t, int64_t i, int64_t height) {
  return {i / t.plan->strips, part(height, t.plan->strips, i % t.plan->strips)};
}

// Calls f(strip's number, chunk) for all of the task, in the order that the plan chose.
template <class F>
void for_each_strip(const TrainTask& t, const F& f) {
  if (t.plan->chunk_by_chunk) {
    for (int64_t chunk = t.chunks.first; chunk < t.chunks.last; ++chunk) {
      for (int64_t i = t.strips.first; i < t.strips.last; ++i) f(i, chunk);
    }
  } else {
    for (int64_t i = t.strips.first; i < t.strips.last; ++i) {
      for (int64_t chunk = t.chunks.first; chunk < t.chunks.last; ++chunk) f(i, chunk);
    }
  }
}

// Calls f(rows) for `step` rows at a time.
template <class F>
void for_each_tile(Range rows, int64_t step, const F& f) {
  for (int64_t first = rows.first; first < rows.last; first += step) {
    f(Range{first, first + step < rows.last ? first + step : rows.last});
  }
}

struct TrainScratch {
  Buffers buffers;
  Ring ring;
  Rows d_depthwise;  // rows of the depthwise output's gradient
  const float* zeros;
  float *tile[3], *strip[2], *taps;

  explicit TrainScratch(const TrainTask& t)
      : buffers{t.scratch},
        ring(all_columns(*t.shape), t.plan->ring_rows, t.plan->ring_row,
             buffers.take((t.plan->ring_rows + 1) * t.plan->ring_row)),
        d_depthwise{},
        zeros(nullptr) {
    const TrainPlan& p = *t.plan;
    float* rows = buffers.take((p.gradient_rows + 1) * p.gradient_row);  // the last one stays a row of zeros
    clear(rows, (p.gradient_rows + 1) * p.gradient_row);
    zeros = rows + p.gradient_rows * p.gradient_row + kGradientColumns * kChunk;
    d_depthwise = {rows + kGradientColumns * kChunk, p.gradient_rows, p.gradient_row};
    for (float*& b : tile) b = buffers.take(p.tile);
    for (float*& b : strip) b = buffers.take(p.strip);
    taps = buffers.take(t.shape->kernel * t.shape->kernel * kChunk);
  }
};

// One chunk of one image in training.
struct TrainChunk {
  const TrainTask& t;
  const BlockShape backward_block;
  HiddenChunk forward, backward;
  int64_t image, number;  // the chunk's
  int64_t channel, vectors;
  int64_t own;                // the channel counted from the task's first chunk on
  int64_t first_pixel, wide;  // of the image in the batch; offset of the image's wide map
  int64_t wide_in;            // the same for wide maps of the input's pixels

  TrainChunk(const TrainTask& task, int64_t of_image, int64_t chunk)
      : t(task),
        backward_block(backward_shape(*task.shape)),
        forward(*task.shape, task.packed, chunk),
        backward(backward_block, task.packed_backward, chunk),
        image(of_image),
        number(chunk),
        channel(chunk * kChunk),
        vectors(forward.panels.vectors),
        own((chunk - task.first_chunk) * kChunk) {
    const BlockShape& s = *t.shape;
    first_pixel = image * h_out(s) * w_out(s);
    wide = own * s.n * h_out(s) * w_out(s) + first_pixel * kChunk;
    wide_in = (own * s.n + image * kChunk) * s.h * s.w;
    forward.x = t.x + image * s.h * s.w * s.c_in;
    if (t.expanded) {
      forward.expanded = t.expanded + wide_in;
      forward.scale = t.expand_scale + channel;
      forward.shift = t.expand_shift + channel;
    }
    if (t.d_project) backward.x = t.d_project + first_pixel * s.c_out;
  }
  TrainChunk(const TrainChunk&) = delete;
  TrainChunk& operator=(const TrainChunk&) = delete;

  // Offset of an output row in a wide map.
  int64_t at(int64_t row) const { return wide + row * w_out(*t.shape) * kChunk; }

  // Offset of an input row in a wide map of the input's pixels.
  int64_t at_in(int64_t row) const { return wide_in + row * t.shape->w * kChunk; }

  // The expansion's bias, to `bias` (kChunk).
  void expand_bias(float* bias) const {
    for (int64_t i = 0; i < forward.panels.count; ++i) {
      const int64_t begin = panel_begin(forward.panels, i) * Vec::kLanes;
      const int64_t end = panel_begin(forward.panels, i + 1) * Vec::kLanes;
      const float* panel = forward.weights + begin * (1 + t.shape->c_in);
      for (int64_t c = begin; c < end; ++c) bias[c] = panel[c - begin];
    }
  }

  // Output rows of a wide map before `end`, to be fetched.
  Ahead wide_rows(const float* map, Range rows, int64_t end) const {
    const int64_t last = rows.last < end ? rows.last : end;
    return map && rows.first < last ? Ahead{map + at(rows.first), at(last) - at(rows.first)} : Ahead{};
  }

  // Rows of a wide map that are about to be written. They are fetched unless stores go past the caches.
  Ahead rows_to_keep(const float* map, Range rows) const {
    return wide_rows(t.plan->streams ? nullptr : map, rows, rows.last);
  }

  // Applies the depthwise norm and its activation.
  void activate(const float* hidden, int64_t pixels, float* activated) const {
    normalise(hidden, pixels, vectors, t.scale + channel, t.shift + channel, t.shape->act, activated);
  }

  // Adds d_project' activated over output rows `rows`; `activated` is scratch for as many pixels.
  void add_project_weight(Range rows, const float* hidden, float* activated) const {
    const int64_t width = w_out(*t.shape), pixels = (rows.last - rows.first) * width, c_out = t.shape->c_out;
    activate(hidden, pixels, activated);
    accumulate({.a = backward.x + rows.first * width * c_out,
                .a_row = c_out,
                .b = activated,
                .b_row = kChunk,
                .k = pixels,
                .c = t.d_project_weight + own * c_out,
                .c_row = kChunk},
               c_out, forward.channels);
  }

  // Adds x' d_expand over input rows `rows`.
  void add_expand_weight(Range rows, const float* d_expand) const {
    const int64_t c_in = t.shape->c_in;
    accumulate({.a = forward.x + rows.first * t.shape->w * c_in,
                .a_row = c_in,
                .b = d_expand,
                .b_row = kChunk,
                .k = (rows.last - rows.first) * t.shape->w,
                .c = t.d_expand_weight + own * c_in,
                .c_row = kChunk},
               c_in, forward.channels);
  }

  // The task's backward of a norm: the gradient of its input, from that of its output and its input. `out` may be `dy`.
  void norm_backward(const float* dy, const float* input, int64_t pixels, float* out) const {
    for (int64_t lane = 0; lane < vectors * Vec::kLanes; lane += Vec::kLanes) {
      const auto load = [&](const float* p) { return Vec::load(p + channel + lane); };
      const Vec a = load(t.backward[0]), c = load(t.backward[2]);
      if (!t.backward[1]) {  // 0 * Inf is not 0
        for (int64_t i = lane; i < pixels * kChunk; i += kChunk) fma(Vec::load(dy + i), a, c).store(out + i);
        continue;
      }
      const Vec b = load(t.backward[1]);
      for (int64_t i = lane; i < pixels * kChunk; i += kChunk) {
        fma(Vec::load(dy + i), a, fma(Vec::load(input + i), b, c)).store(out + i);
      }
    }
  }

  // Copies of a tile in wide maps; null: none.
  struct Kept {
    float *hidden, *d_hidden;
  };

  // Computes d_hidden over output rows `rows` from d_project and `hidden`. Adds to the task's sums if `with_sums`.
  void project_to_hidden(Range rows, const float* hidden, float* d_hidden, bool with_sums, const Kept& kept) const {
    const int64_t width = w_out(*t.shape), pixels = (rows.last - rows.first) * width;
    backward.expand(rows, {d_hidden, rows.last - rows.first, width * kChunk, rows.first});
    if (t.plan->streams) {
      clip(hidden, d_hidden, pixels, with_sums, kept, [](Vec v, float* to) { v.stream(to); });
    } else {
      clip(hidden, d_hidden, pixels, with_sums, kept, [](Vec v, float* to) { v.store(to); });
    }
  }

 private:
  template <class Store>
  void clip(const float* hidden, float* d_hidden, int64_t pixels, bool with_sums, const Kept kept,
            const Store& store) const {
    constexpr int L = Vec::kLanes, kChains = 2;
    const Vec lo = Vec::broadcast(t.shape->act.lo), hi = Vec::broadcast(t.shape->act.hi);
    for (int64_t v = 0; v < vectors; ++v) {
      const int64_t at = channel + v * L;
      const Vec scale = Vec::load(t.scale + at), shift = Vec::load(t.shift + at), mean = Vec::load(t.mean + at);
      Vec sum[kChains] = {Vec::zero(), Vec::zero()}, centred[kChains] = {Vec::zero(), Vec::zero()};
      const auto clip_pixel = [&](int64_t pixel, int chain) __attribute__((always_inline)) {
        const int64_t i = pixel * kChunk + v * L;
        const Vec x = Vec::load(hidden + i);
        const Vec dy = inside(fma(x, scale, shift), lo, hi, Vec::load(d_hidden + i));
        dy.store(d_hidden + i);
        sum[chain] = add(sum[chain], dy);
        centred[chain] = fma(dy, sub(x, mean), centred[chain]);
        if (kept.hidden) store(x, kept.hidden + i);
        if (kept.d_hidden) store(dy, kept.d_hidden + i);
      };
      int64_t pixel = 0;
      for (; pixel + kChains <= pixels; pixel += kChains) clip_pixel(pixel, 0), clip_pixel(pixel + 1, 1);
      if (pixel < pixels) clip_pixel(pixel, 0);
      if (!with_sums) continue;
      float sum_dy[L], sum_dy_centred[L];
      add(sum[0], sum[1]).store(sum_dy);
      add(centred[0], centred[1]).store(sum_dy_centred);
      for (int i = 0; i < L; ++i) t.sum_dy[at + i] += sum_dy[i], t.sum_dy_centred[at + i] += sum_dy_centred[i];
    }
  }
};

}  // namespace
}  // namespace mnv2
