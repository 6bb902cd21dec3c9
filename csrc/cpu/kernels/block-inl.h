// The fused block: for each chunk of hidden channels, expand rows into a ring, filter them depthwise into a row
// buffer, project that onto the output. The expanded tensor exists only as the ring. Included once per ISA.
#pragma once

#include "depthwise-inl.h"
#include "stem-inl.h"

namespace mnv2 {
namespace {

struct BlockScratch {
  float* ring;      // (ring_rows, ring_row)
  float* zeros;     // (ring_row): a row outside the image
  float* filtered;  // (rows, w_out, kChunk)
  float* window;    // the stem's input rows
};

// Copies hidden channels [channel, channel + count) of a row of x where there is no expansion.
void copy_row(const float* x, int64_t w, int64_t c_in, int64_t channel, int64_t count, float* out) {
  for (int64_t col = 0; col < w; ++col) {
    const float* from = x + col * c_in + channel;
    float* to = out + col * kChunk;
    int64_t i = 0;
    for (; i + Vec::kLanes <= count; i += Vec::kLanes) Vec::load(from + i).store(to + i);
    if (i < count) Vec::load_first(from + i, static_cast<int>(count - i)).store(to + i);
  }
}

// Where a chunk's projection goes; all of them (rows of the strip, w_out, c_out).
struct Sum {
  float* to;
  const float* from;      // what the chunks before have summed up; null: nothing
  const float* residual;  // added at the end; or null
  bool bias;              // begin with the projection's bias where `from` is null
};

// Expands, filters and projects one chunk of hidden channels over the rows of the strip.
void block_chunk(const BlockTask& t, const BlockLayout& layout, const BlockScratch& scratch, const float* x,
                 int64_t x_first, int64_t chunk, const Sum& sum) {
  const BlockShape& s = *t.shape;
  const BlockPlan& p = *t.plan;
  const int64_t out_width = w_out(s);
  const int64_t channel = chunk * kChunk;
  const int64_t channels = s.c_hidden - channel < kChunk ? s.c_hidden - channel : kChunk;
  const Panels hidden = panels_of(channels, kLanes), out = panels_of(s.c_out, kLanes);
  const ChunkLayout offsets = chunk_layout(channels, s.c_in, s.c_out, s.kernel, s.has_expand, kLanes);
  const float* expand = t.packed + layout.first + chunk * layout.chunk;
  const float* filter = expand + offsets.depthwise;
  const float* project = expand + offsets.project;
  Ahead ahead{expand + layout.chunk, layout.chunk};

  StemWindow window(t.stem, scratch.window);
  int64_t next = x_first;  // first input row that is not in the ring
  for (int64_t first = t.rows.first; first < t.rows.last; first += p.rows) {
    const Range rows{first, first + p.rows < t.rows.last ? first + p.rows : t.rows.last};
    const Range input = input_rows(s, rows);
    if (next < input.first) next = input.first;

    if (s.has_expand) {
      for (int64_t i = 0; i < hidden.count; ++i) {
        const int64_t begin = panel_begin(hidden, i), vectors = panel_begin(hidden, i + 1) - begin;
        const float* panel = expand + begin * Vec::kLanes * (1 + s.c_in);
        for (int64_t row = next; row < input.last; ++row) {
          const float* a = x + (row - x_first) * s.w * s.c_in;
          MultiplyArgs m{};
          m.a = &a;
          m.segments = 1;
          m.k = s.c_in;
          m.a_row = s.c_in;
          m.bias = panel;
          m.b = panel + vectors * Vec::kLanes;
          m.c = scratch.ring + row % p.ring_rows * p.ring_row + s.pad_left * kChunk + begin * Vec::kLanes;
          m.c_row = kChunk;
          m.lo = s.lo;
          m.hi = s.hi;
          m.ahead = &ahead;
          multiply<Epilogue::kExpand>(m, s.w, vectors);
        }
      }
    } else if (t.stem) {
      for (int64_t row = next; row < input.last; ++row) {
        window.move_to(row);
        window.convolve<Epilogue::kExpand>(channel, channels,
                                           scratch.ring + row % p.ring_rows * p.ring_row + s.pad_left * kChunk, kChunk);
      }
    } else {
      for (int64_t row = next; row < input.last; ++row) {
        copy_row(x + (row - x_first) * s.w * s.c_in, s.w, s.c_in, channel, channels,
                 scratch.ring + row % p.ring_rows * p.ring_row + s.pad_left * kChunk);
      }
    }
    if (next < input.last) next = input.last;

    for (int64_t row = rows.first; row < rows.last; ++row) {
      const float* taps[63];
      for (int64_t ky = 0; ky < s.kernel; ++ky) {
        const int64_t in = row * s.stride - s.pad_top + ky * s.dilation;
        taps[ky] = in < 0 || in >= s.h ? scratch.zeros : scratch.ring + in % p.ring_rows * p.ring_row;
      }
      DepthwiseArgs d{};
      d.rows = taps;
      d.out = scratch.filtered + (row - rows.first) * out_width * kChunk;
      d.weights = filter;
      d.w_out = out_width;
      d.vectors = hidden.vectors;
      d.kernel = s.kernel;
      d.stride = s.stride;
      d.dilation = s.dilation;
      d.lo = s.lo;
      d.hi = s.hi;
      depthwise_row(d);
    }

    const float* a = scratch.filtered;
    const int64_t offset = (rows.first - t.rows.first) * out_width * s.c_out;
    for (int64_t i = 0; i < out.count; ++i) {
      const int64_t begin = panel_begin(out, i), end = panel_begin(out, i + 1);
      const int64_t column = begin * Vec::kLanes, width = (end - begin) * Vec::kLanes;
      MultiplyArgs m{};
      m.a = &a;
      m.segments = 1;
      m.k = channels;  // the padding of the hidden channels is left out: 0 * Inf is not 0
      m.a_row = kChunk;
      m.b = project + column * channels;
      m.bias = sum.bias ? t.packed + column : kNoBias;
      m.c = sum.to + offset + column;
      m.c_row = s.c_out;
      m.last = static_cast<int>((s.c_out < column + width ? s.c_out : column + width) - (end - 1) * Vec::kLanes);
      m.from = sum.from ? sum.from + offset + column : nullptr;
      m.residual = sum.residual ? sum.residual + offset + column : nullptr;
      m.ahead = &ahead;
      multiply<Epilogue::kProject>(m, (rows.last - rows.first) * out_width, end - begin);
    }
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

  BlockScratch scratch{};
  float* free = t.scratch;
  auto take = [&free](int64_t count) {
    float* taken = free;
    free += round_up(count, kAlign);
    return taken;
  };
  scratch.ring = take(p.ring_rows * p.ring_row);
  scratch.zeros = take(p.ring_row);
  scratch.filtered = take(p.rows * w_out(s) * kChunk);
  clear(scratch.zeros, p.ring_row);
  for (int64_t i = 0; i < p.ring_rows; ++i) {  // the columns left and right of the image stay zero from here on
    float* row = scratch.ring + i * p.ring_row;
    clear(row, s.pad_left * kChunk);
    clear(row + (s.pad_left + s.w) * kChunk, p.ring_row - (s.pad_left + s.w) * kChunk);
  }

  const float* x = nullptr;
  if (t.stem) {
    scratch.window = take(stem_window(*t.stem->shape));
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
      Sum sum{target, c > chunks.first ? target : nullptr, nullptr, g == 0};
      if (last && g == 0) sum.residual = residual;
      if (last && target == rest && rest) sum.to = y, sum.residual = y;
      block_chunk(t, layout, scratch, x, input.first, c, sum);
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
