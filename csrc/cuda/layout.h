// The layout of packed weights. Torch-free, host only: kernels get what they need of it in their arguments.
//
// Weights are packed as the fragments of matrix multiplications. Sums run over groups of 16 channels. Lane 4 g + t
// holds four of a group, as value_of_group() says (of the projection channels 8 t to 8 t + 7 of 32 hidden ones, as two
// groups), and column g of each of a chunk's tiles of 8 columns. Columns may be in any order: theirs puts the two
// columns that a lane gets of a tile beside the two that it gets of the next (see pack.cuh).
#pragma once

#include <algorithm>

#include "../shapes.h"

namespace mnv2 {
namespace cuda {

// Hidden channels that are expanded, filtered and projected at a time.
constexpr int kChunk = 32;
constexpr int kGroup = 16;  // channels of a step of a sum
constexpr int kTile = 8;    // columns of a tensor core's product
// Of a chunk's biases (fp32): neighbouring channels in pairs, each pair twice, as a lane has it in two rows of sums.
constexpr int kBiasBytes = kChunk * 2 * 4;

// Tiles of output channels that a kernel holds the sums of; each number has variants of the kernel. More channels are
// shared out to several thread blocks.
constexpr int kColumnTiles[] = {2, 3, 4, 8, 12, 20};

// How the output channels are shared out.
struct Columns {
  int parts;
  int tiles;  // of each part: one of kColumnTiles
};

static inline Columns columns_of(int64_t c_out) {
  const int64_t tiles = divide_up(c_out, kTile);
  const int most = kColumnTiles[5];
  const int64_t parts = divide_up(tiles, most), each = divide_up(tiles, parts);
  for (const int t : kColumnTiles)
    if (t >= each) return {static_cast<int>(parts), t};
  return {static_cast<int>(parts), most};
}

static inline int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }
static inline int64_t element_bytes(DType dtype) { return dtype_bytes(dtype); }
// Depthwise filters: fp16 is filtered in fp16, all else in fp32.
static inline int64_t filter_bytes(DType dtype) { return dtype == DType::kFloat16 ? 2 : 4; }

// Bytes. First the projection's biases (fp32, of all parts), then the chunks of hidden channels, for each part of the
// output channels. A chunk: expand weights and biases, depthwise filters tap by tap and their biases, and the
// part's projection. All but `first`, `chunk` and `size` are from a chunk's start.
struct BlockLayout {
  int64_t chunks;
  int64_t first;  // the start of chunk 0
  int64_t expand_bias;
  int64_t filters;
  int64_t filter_bias;
  int64_t project;
  int64_t chunk;
  int64_t size;
};

// c_in: channels that the expansion sums over; 0: there is no expansion.
static inline BlockLayout block_layout(int64_t c_in, int64_t c_hidden, int64_t c_out, int64_t kernel, DType dtype) {
  const Columns columns = columns_of(c_out);
  const int64_t element = element_bytes(dtype), filter = filter_bytes(dtype);
  BlockLayout l{};
  l.chunks = divide_up(c_hidden, kChunk);
  l.first = int64_t{columns.parts} * columns.tiles * kTile * 4;
  l.expand_bias = divide_up(c_in, kGroup) * kGroup * kChunk * element;
  l.filters = l.expand_bias + (c_in > 0 ? kBiasBytes : 0);
  l.filter_bias = l.filters + kernel * kernel * kChunk * filter;
  l.project = l.filter_bias + kChunk * filter;
  l.chunk = l.project + int64_t{columns.tiles} * kTile * kChunk * element;
  l.size = l.first + columns.parts * l.chunks * l.chunk;
  return l;
}

static inline BlockLayout block_layout(const BlockShape& s, DType dtype) {
  return block_layout(s.has_expand ? s.c_in : 0, s.c_hidden, s.c_out, s.kernel, dtype);
}
static inline int64_t block_size(const BlockShape& s, DType dtype) { return block_layout(s, dtype).size; }

// Bytes of a matrix with its biases, in chunks of 32 columns: weights, then biases.
static inline int64_t matrix_chunk(int64_t rows, DType dtype) {
  return divide_up(rows, kGroup) * kGroup * kChunk * element_bytes(dtype) + kBiasBytes;
}
static inline int64_t matrix_size(int64_t rows, int64_t columns, DType dtype) {
  return divide_up(columns, kChunk) * matrix_chunk(rows, dtype);
}

// The sum of a dense convolution's window, as an image's tile gives it (see window.cuh): slice by slice of the
// channels, row by row of the kernel, (kernel, channels of the slice) values. Rows have whole pairs and slices whole
// groups of values; those beyond a row's or a slice's end have no weight.
static inline int64_t slice_channels(int64_t channels, int64_t kernel) {
  return std::min(channels, std::clamp<int64_t>(4096 / (kernel * kernel), 1, 64));
}
static inline int64_t slice_row(int64_t channels, int64_t kernel) { return round_up(kernel * channels, 2); }
static inline int64_t slice_values(int64_t channels, int64_t kernel) {
  return round_up(kernel * slice_row(channels, kernel), kGroup);
}
static inline int64_t window_values(int64_t channels, int64_t kernel) {
  const int64_t slice = slice_channels(channels, kernel), whole = (channels - 1) / slice;
  return whole * slice_values(slice, kernel) + slice_values(channels - whole * slice, kernel);
}
static inline int64_t window_values(const DenseShape& s) { return window_values(s.c_in, s.kernel); }
static inline int64_t dense_size(const DenseShape& s, DType dtype) {
  return matrix_size(window_values(s), s.c_out, dtype);
}

static inline int64_t head_size(int64_t c_in, int64_t c_last, int64_t classes, DType dtype) {
  return matrix_size(c_in, c_last, dtype) + matrix_size(c_last, classes, dtype);
}

}  // namespace cuda
}  // namespace mnv2
