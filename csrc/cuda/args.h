// What the kernels are given: pointers, sizes, and everything that the host can work out for them. Offsets and pitches
// are bytes.
#pragma once

#include <cstdint>

namespace mnv2 {
namespace cuda {

// What plan and kernels have to agree on. A warp holds the sums of rows_of_warp() times 16 output pixels, as far as
// registers go; where blocks_at_once() is 2, a kernel takes so few that two thread blocks fit.
constexpr int kMostThreads = 256;
constexpr int rows_of_warp(int element_bytes, int column_tiles) {
  return element_bytes == 2 && column_tiles <= 12 ? 2 : 1;
}
constexpr int expanded_at_once(int element_bytes, int column_tiles) {  // pixels
  return element_bytes == 2 && column_tiles < 20 ? 32 : 16;
}
constexpr int blocks_at_once(int filter_bytes, int column_tiles) {
  return filter_bytes == 2 && column_tiles <= 4 ? 2 : 1;
}

// An image map that a stem reads, in any layout; strides are elements.
struct WindowArgs {
  const void* x;
  int64_t stride_n, stride_c, stride_h, stride_w;
  int32_t h, w, c;
  int32_t kernel, stride, pad_top, pad_left;
};

// A block of 2 x 2 or 1 x 2 neighbouring output pixels belongs to one lane (a patch): `tile_h` x `tile_w` pixels of
// `images` images to one thread block. Patches are counted pair of rows by pair of rows.
struct BlockArgs {
  const void* x;      // (n, h, w, c_in)
  WindowArgs window;  // where the expansion is the stem's convolution
  const unsigned char* packed;
  const unsigned char* expand;  // the expansion's part of it, or the packed stem
  void* y;                      // (n, h_out, w_out, c_out)
  float* partial;               // where the hidden channels are split: (blocks, splits, values of a thread, threads)
  uint32_t* tickets;            // the same: (blocks), zeros before and after
  int64_t n;
  int32_t h, w, h_out, w_out;
  int32_t c_in, c_hidden, c_out;
  int32_t kernel, stride, dilation, pad_top, pad_left;
  float expand_lo, expand_hi, lo, hi;
  bool has_expand, windows, residual;
  bool vectors_in, vectors_out;  // 16-byte copies of x, whole vectors to y
  // Tiles.
  int32_t tile_h, tile_w, images;
  int32_t tiles_y, tiles_x;
  int32_t patch_columns, patch_rows;  // of a tile
  int32_t chunks, splits, parts;
  int32_t threads;
  // Packed weights, see BlockLayout: where they are in a chunk in shared memory and, _from, in `packed`.
  int32_t groups;  // steps of the expansion's sum
  int32_t first, chunk, expand_chunk;
  int32_t expand_bias, filters, filter_bias, project, project_part;
  int32_t filters_from, project_from;
  // Shared memory.
  int32_t x_pitch;           // of a pixel
  int32_t e_pitch, e_image;  // of a row and an image of the expanded tile
  int32_t x_at, e_at, weights_at, table_at;
  int32_t weights_bytes;  // from one of two places for a chunk's weights to the other; 0: there is one
};

// The stem alone: a thread block takes kStemPixels output pixels of an image and 32 channels. An output image, rounded
// up to these, has fewer than 2^31 pixels.
constexpr int kStemThreads = 128, kStemPixels = 128;

struct StemArgs {
  WindowArgs window;
  const unsigned char* packed;
  void* y;  // (n, h_out, w_out, c_out)
  int64_t n;
  int32_t h_out, w_out, c_out;
  float lo, hi;
  bool vectors_out;
  int32_t groups, at_once;     // steps of the sum, and those whose values lie in shared memory together
  int32_t chunk, expand_bias;  // bytes
  int32_t x_pitch;
};

// The last 1x1 convolution, clamped and averaged over the pixels: a thread block takes `images` images and 128
// channels, 32 a warp, kPoolPixels pixels at a time.
constexpr int kPoolThreads = 128, kPoolPixels = 64;

struct PoolArgs {
  const void* x;  // (n, pixels, c_in)
  const unsigned char* packed;
  void* pooled;  // (n, whole chunks of c_last), zeros beyond c_last
  int64_t n, pixels;
  int32_t c_in, c_last, images;
  float lo, hi;
  bool vectors_in;
  int32_t groups, at_once;     // as in StemArgs
  int32_t chunk, expand_bias;  // bytes
  int32_t x_pitch;
};

// The classifier: a thread block takes 16 images and 32 classes, a warp a share of the sum.
constexpr int kClassifyThreads = 256, kClassifyImages = 16;

struct ClassifyArgs {
  const void* pooled;  // (n, pooled_row)
  const unsigned char* packed;
  void* y;  // (n, classes)
  int64_t n;
  int32_t classes, pooled_row;
  int32_t groups, chunk, expand_bias;  // bytes
};

// Weights to be packed, a value a thread. Pointers to contiguous fp32; null: the layout has no such part.
constexpr int kPackThreads = 256;

struct PackArgs {
  const float *expand, *expand_bias;        // (c_hidden, channels, taps), (c_hidden)
  const float *depthwise, *depthwise_bias;  // (c_hidden, filter_taps), (c_hidden)
  const float *project, *project_bias;      // (c_out, c_hidden), (c_out)
  unsigned char* packed;
  int32_t channels, taps;  // the expansion sums over taps and, within one, channels
  int32_t groups;          // of 16 of these
  int32_t c_hidden, c_out, filter_taps;
  int32_t parts, tiles;  // of the output channels
  int32_t chunks;
  int64_t first, chunk, expand_bias_at, filters_at, project_at;  // bytes, see BlockLayout
  int64_t chunk_values, values;                                  // of a chunk; of all
};

}  // namespace cuda
}  // namespace mnv2
