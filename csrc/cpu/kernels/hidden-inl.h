// One chunk of hidden channels of one image, row by row: expanded, then filtered depthwise. Included once per ISA.
#pragma once

#include "depthwise-inl.h"
#include "stem-inl.h"

namespace mnv2 {
namespace {

// Rows of kChunk-wide pixels, `row` floats apart, as a ring: row `origin` is the first of `rows`.
struct Rows {
  float* first;
  int64_t rows, row;
  int64_t origin = 0;

  float* operator[](int64_t i) const { return first + (i - origin) % rows * row; }
};

// Copies hidden channels [channel, channel + count) of `w` pixels of x, which they are if there is no expansion.
void copy_row(const float* x, int64_t w, int64_t c_in, int64_t channel, int64_t count, float* out) {
  for (int64_t col = 0; col < w; ++col) {
    const float* from = x + col * c_in + channel;
    float* to = out + col * kChunk;
    int64_t i = 0;
    for (; i + Vec::kLanes <= count; i += Vec::kLanes) Vec::load(from + i).store(to + i);
    if (i < count) Vec::load_first(from + i, static_cast<int>(count - i)).store(to + i);
  }
}

// A norm and an activation of `pixels` pixels of a chunk: clamp(scale * from + shift), vector by vector.
void normalise(const float* from, int64_t pixels, int64_t vectors, const float* scale, const float* shift,
               const Activation& act, float* to) {
  const Vec lo = Vec::broadcast(act.lo), hi = Vec::broadcast(act.hi);
  for (int64_t lane = 0; lane < vectors * Vec::kLanes; lane += Vec::kLanes) {
    const Vec a = Vec::load(scale + lane), b = Vec::load(shift + lane);
    for (int64_t i = lane; i < pixels * kChunk; i += kChunk)
      clamp(fma(Vec::load(from + i), a, b), lo, hi).store(to + i);
  }
}

// How a chunk's projection is added up; all maps are (pixels, c_out).
struct Sum {
  float* to;
  const float* from;                // the sum of the chunks before; or null
  const float* residual;            // added at the end; or null
  const float* bias;                // starts the sum if `from` is null; null means zeros
  const Activation* act = nullptr;  // clamps the sum; or null
  const float* shortcut = nullptr;  // added to the clamped sum; or null

  Sum at(int64_t offset) const {
    return {.to = to + offset,
            .from = from ? from + offset : nullptr,
            .residual = residual ? residual + offset : nullptr,
            .bias = bias,
            .act = act,
            .shortcut = shortcut ? shortcut + offset : nullptr};
  }
};

// The sum at `to`, on top of what is there already or, if `more` is false, from zero.
inline Sum add_to(float* to, bool more) { return {to, more ? to : nullptr, nullptr, nullptr}; }

struct HiddenChunk {
  const BlockShape* shape;
  const float* x;  // rows from x_first on and columns from columns.first on: (rows, columns, c_in), rows x_row apart
  int64_t x_first, x_row;
  Range columns;               // that are expanded
  StemWindow* window;          // computes the hidden channels of a block without expansion, instead of x; or null
  const float* expanded;       // the image (h, w, kChunk) expanded before its norm, which replaces x; or null
  const float *scale, *shift;  // that norm's, (kChunk)
  int64_t channel, channels;
  Panels panels;
  ChunkLayout offsets;
  const float* weights;  // see ChunkLayout
  Ahead* ahead;          // or null

  HiddenChunk(const BlockShape& s, const void* packed, int64_t chunk)
      : shape(&s),
        x(nullptr),
        x_first(0),
        x_row(s.w * s.c_in),
        columns{0, s.w},
        window(nullptr),
        expanded(nullptr),
        scale(nullptr),
        shift(nullptr),
        channel(chunk * kChunk),
        channels(s.c_hidden - channel < kChunk ? s.c_hidden - channel : kChunk),
        panels(panels_of(channels, kLanes)),
        offsets(chunk_layout(channels, s.c_in, s.c_out, s.kernel, s.has_expand, kLanes)),
        weights(nullptr),
        ahead(nullptr) {
    const BlockLayout layout = block_layout(s.c_in, s.c_hidden, s.c_out, s.kernel, s.has_expand, kLanes);
    weights = weights_of(packed) + layout.first + chunk * layout.chunk;
  }

  // The depthwise convolution's input, rows [rows.first, rows.last), to `to`, column columns.first first. An expansion
  // is clamped.
  void expand(Range rows, const Rows& to) const {
    if (expanded) {
      for (int64_t row = rows.first; row < rows.last; ++row) {
        normalise(expanded + row * shape->w * kChunk, shape->w, panels.vectors, scale, shift, shape->act, to[row]);
      }
      return;
    }
    if (shape->has_expand) return multiply_rows(rows, to, shape->act);
    for (int64_t row = rows.first; row < rows.last; ++row) {
      if (window) {
        window->move_to(row);
        window->convolve(channel, channels, true, to[row], kChunk);
      } else {
        copy_row(row_of_x(row), columns.last - columns.first, shape->c_in, channel, channels, to[row]);
      }
    }
  }

  // The expansion of rows [rows.first, rows.last) before its norm and its clamp.
  void expand_alone(Range rows, float* to) const {
    multiply_rows(rows, {to, rows.last - rows.first, shape->w * kChunk, rows.first}, kNoActivation);
  }

  // Adds the chunk's part of the projection of `a` (pixels, kChunk).
  void project(const float* a, int64_t pixels, const Sum& sum) const {
    MultiplyArgs m{};
    m.a = &a;
    m.segments = 1;
    m.k = channels;  // not the padding of the hidden channels: 0 * Inf is not 0
    m.a_row = kChunk;
    m.b = weights + offsets.project;
    m.bias = sum.from ? nullptr : sum.bias;
    m.c = sum.to;
    m.c_row = shape->c_out;
    // Sums over many chunks are sums of the chunks' own sums.
    (shape->c_hidden > kLongestSum ? m.before : m.start) = sum.from;
    m.residual = sum.residual;
    m.shortcut = sum.shortcut;
    if (sum.act) m.clamps = true, m.lo = sum.act->lo, m.hi = sum.act->hi;
    m.ahead = ahead;
    multiply_panels(m, pixels, shape->c_out);
  }

 private:
  const float* row_of_x(int64_t row) const { return x + (row - x_first) * x_row; }

  void multiply_rows(Range rows, const Rows& to, const Activation& act) const {
    const BlockShape& s = *shape;
    const int64_t width = columns.last - columns.first;
    const bool no_gaps = to.row == width * kChunk && x_row == width * s.c_in;
    for (int64_t i = 0; i < panels.count; ++i) {
      const int64_t begin = panel_begin(panels, i), vectors = panel_begin(panels, i + 1) - begin;
      const float* panel = weights + begin * Vec::kLanes * (1 + s.c_in);
      // Rows that follow one another without a gap are one long row.
      const int64_t count = rows.last - rows.first, place = (rows.first - to.origin) % to.rows;
      const int64_t step = no_gaps && place + count <= to.rows ? count : 1;
      for (int64_t row = rows.first; row < rows.last; row += step) {
        const float* a = row_of_x(row);
        MultiplyArgs m{};
        m.a = &a;
        m.segments = 1;
        m.k = s.c_in;
        m.a_row = s.c_in;
        m.bias = panel;
        m.b = panel + vectors * Vec::kLanes;
        m.c = to[row] + begin * Vec::kLanes;
        m.c_row = kChunk;
        m.last = Vec::kLanes;
        m.lo = act.lo;
        m.hi = act.hi;
        m.ahead = ahead;
        multiply<Epilogue::kExpand>(m, step * width, vectors);
      }
    }
  }
};

// The expanded rows that a depthwise filter needs at a time, with zero columns left and right of the image. If columns
// are cut, their columns alone.
struct Ring {
  Columns columns;
  Rows rows;           // column columns.in.first first
  const float* zeros;  // a row outside the image
  int64_t next;        // first input row that is not in the ring yet

  // `memory`: ring_rows + 1 rows of ring_row floats.
  Ring(const Columns& c, int64_t ring_rows, int64_t ring_row, float* memory)
      : columns(c), rows{memory + c.left * kChunk, ring_rows, ring_row}, zeros(memory + ring_rows * ring_row), next(0) {
    const int64_t right = c.left + c.in.last - c.in.first;
    clear(memory + ring_rows * ring_row, ring_row);
    for (int64_t i = 0; i < ring_rows; ++i) {  // nothing writes the columns left and right of the image later
      float* row = memory + i * ring_row;
      clear(row, c.left * kChunk);
      clear(row + right * kChunk, ring_row - right * kChunk);
    }
  }

  // Output rows [out.first, out.last), clamped to [lo, hi], to `to` (rows, columns, kChunk). Rows must not go backwards
  // within a chunk; set `next` to 0 when a chunk begins.
  void filter(const HiddenChunk& hidden, Range out, float lo, float hi, float* to) {
    const BlockShape& s = *hidden.shape;
    const Range input = input_rows(s, out);
    const int64_t width = columns.out.last - columns.out.first;
    if (next < input.first) next = input.first;
    hidden.expand({next, input.last}, rows);
    if (next < input.last) next = input.last;
    for (int64_t row = out.first; row < out.last; ++row) {
      const float* taps[kMostKernel];
      for (int64_t ky = 0; ky < s.kernel; ++ky) {
        const int64_t in = row * s.stride - s.pad.top + ky * s.dilation;
        taps[ky] = in < 0 || in >= s.h ? zeros : rows[in] - columns.left * kChunk;
      }
      depthwise_row({.rows = taps,
                     .out = to + (row - out.first) * width * kChunk,
                     .weights = hidden.weights + hidden.offsets.depthwise,
                     .w_out = width,
                     .vectors = hidden.panels.vectors,
                     .kernel = s.kernel,
                     .stride = s.stride,
                     .dilation = s.dilation,
                     .lo = lo,
                     .hi = hi});
    }
  }
};

}  // namespace
}  // namespace mnv2
