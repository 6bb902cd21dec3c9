// The dense stem convolution, row by row. Included once per ISA.
#pragma once

#include "multiply-inl.h"
#include "storage-inl.h"
#include "tasks.h"

namespace mnv2 {
namespace {

// How the pixels of an image row lie.
bool is_pixels(const StemInput& t) { return t.stride_channel == 1 && t.stride_column == t.shape->c_in; }
bool is_planes(const StemInput& t) { return t.stride_column == 1; }

// Pixels of three channels. The loop is one that compilers turn into permutations of vectors.
void interleave(const float* r, const float* g, const float* b, int64_t count, float* __restrict out) {
  for (int64_t i = 0; i < count; ++i) {
    out[3 * i] = r[i];
    out[3 * i + 1] = g[i];
    out[3 * i + 2] = b[i];
  }
}

// One image row as consecutive fp32 pixels, whatever its strides and storage type.
void gather_row(const StemInput& t, int64_t row, float* out) {
  const DenseShape& s = *t.shape;
  const Source start = at(t.x, row * t.stride_row);
  if (is_pixels(t)) return copy(start, s.w * s.c_in, out);
  if (is_planes(t) && s.c_in == 3) {
    constexpr int64_t kStep = 128;
    float wide[3][kStep];
    for (int64_t i = 0; i < s.w; i += kStep) {
      const int64_t count = s.w - i < kStep ? s.w - i : kStep;
      const auto plane = [&](int64_t c) { return read(at(start, c * t.stride_channel + i), count, wide[c]); };
      interleave(plane(0), plane(1), plane(2), count, out + 3 * i);
    }
    return;
  }
  for (int64_t c = 0; c < s.c_in; ++c) gather(at(start, c * t.stride_channel), t.stride_column, s.w, out + c, s.c_in);
}

// The input rows that the stem's current output row reads, in a ring with zero columns left and right.
struct StemWindow {
  const StemInput* in;
  float* ring;   // (kernel, stem_ring_row)
  float* zeros;  // (stem_ring_row)
  int64_t next = 0;
  const float* rows[kMostKernel];
  Ahead ahead{};  // the rows from `next` on

  // `scratch`: stem_window() floats.
  StemWindow(const StemInput* input, float* scratch) : in(input), ring(scratch), zeros(nullptr) {
    if (!in) return;
    zeros = ring + in->shape->kernel * stem_ring_row(*in->shape);
    clear(scratch, stem_window(*in->shape));
  }

  // Output rows must not go backwards.
  void move_to(int64_t row) {
    const DenseShape& s = *in->shape;
    for (int64_t ky = 0; ky < s.kernel; ++ky) {
      const int64_t i = row * s.stride - s.pad.top + ky;
      if (i < 0 || i >= s.h) {
        rows[ky] = zeros;
        continue;
      }
      float* slot = ring + i % s.kernel * stem_ring_row(s);
      if (i >= next) {
        gather_row(*in, i, slot + s.pad.left * s.c_in);
        next = i + 1;
      }
      rows[ky] = slot;
    }
    ahead = rows_ahead();
  }

  // Channels [channel, channel + count) of the current output row to c, pixels c_row apart. A window's row is `kernel`
  // neighbouring pixels, so the convolution is a multiplication: A has one segment a window row, and its rows overlap.
  // No im2col. Nothing beyond `count` is written, but with `whole` the zeros of the last vector's padding.
  void convolve(int64_t channel, int64_t count, bool whole, float* c, int64_t c_row) {
    const DenseShape& s = *in->shape;
    const int64_t k = s.kernel * s.c_in, rows_of_b = 1 + s.kernel * k;
    const Panels panels = panels_of(count, kLanes);
    for (int64_t i = 0; i < panels.count; ++i) {
      const int64_t begin = panel_begin(panels, i), end = panel_begin(panels, i + 1);
      const int64_t column = begin * Vec::kLanes, width = (end - begin) * Vec::kLanes;
      MultiplyArgs m{};
      m.a = rows;
      m.segments = s.kernel;
      m.k = k;
      m.a_row = s.stride * s.c_in;
      const float* const panel = weights_of(in->packed) + (channel + column) * rows_of_b;
      m.bias = in->bias ? in->bias + channel + column : panel;
      m.b = panel + width;
      m.c = c + column;
      m.c_row = c_row;
      const int64_t columns = whole || count > column + width ? column + width : count;
      m.last = static_cast<int>(columns - (end - 1) * Vec::kLanes);
      m.lo = s.act.lo;
      m.hi = s.act.hi;
      m.ahead = &ahead;
      multiply<Epilogue::kStem>(m, w_out(s), end - begin);
    }
  }

 private:
  // The image rows that the next output row reads first; none if they lie far apart.
  Ahead rows_ahead() const {
    const DenseShape& s = *in->shape;
    const int64_t count = s.stride < s.h - next ? s.stride : s.h - next;
    if (count <= 0 || !(is_pixels(*in) || is_planes(*in))) return {};
    const int64_t row = is_pixels(*in) ? s.w * s.c_in : s.w, element = dtype_bytes(in->x.dtype);
    if (in->stride_row > 2 * row) return {};
    return {at(in->x, next * in->stride_row).data, ((count - 1) * in->stride_row + row) * element,
            is_pixels(*in) ? 1 : s.c_in, in->stride_channel * element};
  }
};

void stem(const StemTask& t) {
  const DenseShape& s = *t.in.shape;
  const int64_t out_row = w_out(s) * s.c_out;
  StemWindow window(&t.in, t.scratch);
  for (int64_t row = t.rows.first; row < t.rows.last; ++row) {
    window.move_to(row);
    const Draft y(at(t.y, row * out_row), t.scratch + stem_window(s));
    for (int64_t channel = 0; channel < s.c_out; channel += kChunk) {
      const int64_t count = s.c_out - channel < kChunk ? s.c_out - channel : kChunk;
      window.convolve(channel, count, false, y.data + channel, s.c_out);
    }
    y.finish(out_row);
  }
}

}  // namespace
}  // namespace mnv2
