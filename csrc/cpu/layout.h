// Layout of the float kernels' packed weights, and of rows that kernels share. Sizes and offsets are in floats.
// Torch-free, internal linkage.
//
// A weight matrix (K x N) is cut along N into panels of `vectors` x `lanes` columns; a panel is stored as K rows of
// that width, so that the multiplication reads it front to back. N is padded with zeros to whole vectors.
#pragma once

#include "../shapes.h"

namespace mnv2 {

// Hidden channels that are expanded, filtered and projected at a time. 48 divides the hidden width of every t = 6 block
// whose input has a multiple of 8 channels, and is three AVX-512 or six AVX2 vectors.
constexpr int64_t kChunk = 48;

// Most pixels of the input of a block that trains channel by channel, and most for each of its channels: a chunk of a
// wide map should stay in the caches, and be worth keeping there instead of being expanded again.
constexpr int64_t kChannelsPixels = 8192, kChannelsPixelsEach = 72;

// The layout depends on the ISA: floats in a vector, and the widest panel in vectors.
struct Lanes {
  int64_t lanes;
  int64_t panel;

  bool operator==(const Lanes&) const = default;
};

struct Panels {
  int64_t vectors;  // ceil(columns / lanes)
  int64_t count;    // panels
  int64_t lanes;
};

static inline Panels panels_of(int64_t columns, Lanes l) {
  const int64_t vectors = divide_up(columns, l.lanes);
  return {vectors, divide_up(vectors, l.panel), l.lanes};
}

// Panels differ by at most one vector, the wider ones first.
static inline int64_t panel_begin(const Panels& p, int64_t i) {
  const int64_t base = p.vectors / p.count, wider = p.vectors % p.count;
  return i * base + (i < wider ? i : wider);
}

static inline int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

constexpr int64_t kAlign = 16;       // floats in a cache line
constexpr int64_t kWeightBytes = 4;  // of a packed weight

// A block's weights lie in the order of their use: the projection's bias, then chunk after chunk of hidden channels.
struct BlockLayout {
  int64_t chunks;
  int64_t first;  // offset of chunk 0
  int64_t chunk;  // size of a whole chunk
  int64_t size;
};

// Offsets from a chunk's start. First comes the expansion: panel after panel, row 0 is the bias. Depthwise: vector
// after vector, the bias, then the taps. Projection: panel after panel, a row for every hidden channel of the chunk.
struct ChunkLayout {
  int64_t depthwise, project, size;
};

static inline ChunkLayout chunk_layout(int64_t channels, int64_t c_in, int64_t c_out, int64_t kernel, bool has_expand,
                                       Lanes l) {
  const int64_t hidden = round_up(channels, l.lanes);
  ChunkLayout c{};
  c.depthwise = has_expand ? hidden * (1 + c_in) : 0;
  c.project = c.depthwise + hidden * (1 + kernel * kernel);
  c.size = round_up(c.project + round_up(c_out, l.lanes) * channels, kAlign);
  return c;
}

static inline BlockLayout block_layout(int64_t c_in, int64_t c_hidden, int64_t c_out, int64_t kernel, bool has_expand,
                                       Lanes l) {
  BlockLayout b{};
  b.chunks = divide_up(c_hidden, kChunk);
  b.first = round_up(round_up(c_out, l.lanes), kAlign);
  b.chunk = chunk_layout(kChunk, c_in, c_out, kernel, has_expand, l).size;
  const int64_t last = c_hidden - (b.chunks - 1) * kChunk;
  b.size = b.first + (b.chunks - 1) * b.chunk + chunk_layout(last, c_in, c_out, kernel, has_expand, l).size;
  return b;
}

static inline int64_t block_size(const BlockShape& s, Lanes l) {
  return block_layout(s.c_in, s.c_hidden, s.c_out, s.kernel, s.has_expand, l).size;
}

// A single matrix with its bias as row 0 of every panel: the panel's first vector * lanes * (1 + rows).
static inline int64_t matrix_size(int64_t rows, int64_t columns, Lanes l) {
  return round_up(round_up(columns, l.lanes) * (1 + rows), kAlign);
}

// The stem is packed like an expansion whose inputs are the kernel^2 * c_in values of a window.
static inline int64_t stem_size(int64_t c_in, int64_t c_out, int64_t kernel, Lanes l) {
  return matrix_size(kernel * kernel * c_in, c_out, l);
}

// Floats that the head keeps of an image between pooling and classifier.
static inline int64_t pooled_row(const HeadShape& s, Lanes l) { return round_up(s.c_last, l.lanes); }

static inline int64_t head_size(int64_t c_in, int64_t c_last, int64_t classes, Lanes l) {
  return matrix_size(c_in, c_last, l) + matrix_size(c_last, classes, l);
}

}  // namespace mnv2
