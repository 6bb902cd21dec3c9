// The kernels' arguments: pointers, sizes, and everything that the host can compute for them. Offsets and pitches are
// bytes.
#pragma once

#include <cstdint>

namespace mnv2 {
namespace cuda {

// Limits that plans and kernels share, by the registers that there are. A warp holds the sums of rows_of_warp() times
// 16 output pixels. A multiprocessor's registers are enough for threads_at_once(), in one thread block or several;
// without clusters and bulk copies kernels need more of them.
constexpr int kArrivals = 16;  // bytes at the start of shared memory that count copies of weights
constexpr int rows_of_warp(int element_bytes, int column_tiles) {
  return element_bytes == 2 && column_tiles <= 4 ? 2 : 1;
}
constexpr int expanded_at_once(int element_bytes, int column_tiles) {  // pixels
  return element_bytes == 2 && column_tiles <= 4 ? 32 : 16;
}
constexpr bool takes_rounds(int element_bytes, int column_tiles) { return element_bytes != 2 || column_tiles != 12; }
constexpr int threads_at_once(int filter_bytes, int column_tiles, bool clusters) {
  if (column_tiles > 12) return 256;
  if (filter_bytes == 2 && column_tiles == 2) return 640;
  return filter_bytes == 2 && (clusters || column_tiles <= 8) ? 512 : 384;
}

// The images that a stem reads, in any layout, and their tile in shared memory, see window.cuh. Strides are elements.
struct WindowArgs {
  const void* x = nullptr;
  int64_t stride_n = 0, stride_c = 0, stride_h = 0, stride_w = 0;
  bool near = false;  // a row's values lie less than 2^31 elements apart
  int32_t h, w, c;
  int32_t kernel, stride, pad_top, pad_left;
  int32_t slice;    // channels of a tile, see slice_channels()
  float per_slice;  // 1 / slice
  int32_t pitch;    // of the tile's row
  int32_t shifted;  // from the tile to its copy that begins one value later; 0: there is none
  int32_t image;    // from an image's tile to the next one
  int32_t table;    // of the table of pairs
  int32_t lanes;    // threads that load a row together, a power of 2 and at most 32: its logarithm
};
constexpr int kLoadRows = 6;  // of a block's tile, that a thread has loads of at the same time

// A block of 2 x 2 or 1 x 2 neighbouring output pixels belongs to one lane (a patch): `tile_h` x `tile_w` pixels of
// `images` images to one thread block. Patches are counted pair of rows by pair of rows.
struct BlockArgs {
  const void* x = nullptr;                 // (n, h, w, c_in)
  WindowArgs window = {};                  // if `windows`
  const float* bias = nullptr;             // of the output
  const unsigned char* weights = nullptr;  // packed: the first step's, as if it filtered, too
  const unsigned char* stem = nullptr;     // if `windows`: packed
  void* y = nullptr;                       // (n, h_out, w_out, c_out)
  // If splits > 1 and they are no cluster:
  float* partial = nullptr;     // (blocks, splits, values of a thread, threads)
  uint32_t* tickets = nullptr;  // (blocks), zeros before and after
  int32_t clears = 0;           // if splits is 1: so many of `tickets` become zeros, for later launches
  int64_t n, x_image, y_image;  // values of an image
  int32_t h, w, h_out, w_out;
  int32_t c_in, c_hidden, c_out;
  int32_t kernel, stride, dilation, pad_top, pad_left;
  float expand_lo, expand_hi, lo, hi, out_lo, out_hi;
  bool has_expand, windows, residual;  // windows: the expansion is the stem's convolution
  bool clamps_out;                     // to out_lo and out_hi
  bool vectors_in, vectors_out;        // 16-byte copies of x, whole vectors to y
  // Tiles.
  int32_t tile_h, tile_w, images;
  int32_t tiles_y, tiles_x;
  int32_t rounds;                     // groups of `images` that a thread block computes one after the other
  int32_t patch_columns, patch_rows;  // of a tile
  float per_patches, per_pair;        // 1 / patches of an image, of two rows of patches
  int32_t chunks, splits, parts;
  bool cluster;  // the splits of a tile are one
  int32_t threads;
  // Packed weights, see BlockLayout.
  int32_t groups;      // steps of the expansion's sum
  int32_t first;       // where `weights` begin in what is packed
  int32_t chunk;       // from a step's to the next one's
  int32_t rest;        // of a step: all but what expands
  int32_t stem_chunk;  // of `stem`; 0: there is none
  // In shared memory, from the start of a step's; expand_bias: from `expand`.
  int32_t expand, expand_bias, filters, filter_bias, project;
  // Shared memory.
  int32_t x_pitch;           // of a pixel
  float per_vectors;         // 1 / vectors of 16 bytes that a pixel has there
  int32_t e_pitch, e_image;  // of a row and an image of the expanded tile
  int32_t e_second;          // from one expanded tile to another
  bool ahead;                // there are two: a chunk is expanded while the one before is filtered
  // Behind the last step a cluster's sums lie where the weights were.
  int32_t x_at, e_at, weights_at, table_at, to_at;  // to_at: the second half of the table of places
  int32_t weights_bytes;  // from one of two places for a step's weights to the other; 0: there is only one
};

// The stem alone: a thread block takes a tile of at most kStemPixels output pixels of an image, and 32 channels.
constexpr int kStemThreads = 128, kStemPixels = 128;

struct StemArgs {
  WindowArgs window;
  const unsigned char* packed = nullptr;
  const float* image_bias = nullptr;  // (n, c_out), replaces the packed bias; or null
  void* y = nullptr;                  // (n, h_out, w_out, c_out)
  int64_t n;
  int32_t h_out, w_out, c_out;
  float lo, hi;
  bool vectors_out;
  int32_t tile_h, tile_w;  // output pixels of a thread block, at most kStemPixels
  int32_t tiles_y, tiles_x;
  int32_t chunk, expand_bias;  // bytes
};

// The last 1x1 convolution, clamped and averaged over the pixels, kPoolPixels at a time. A thread block takes `images`
// images and 128 channels, 32 a warp. If there are few of them its warps work together on 32 channels, with their
// weights in shared memory behind the pixels, and share the pixels.
constexpr int kPoolThreads = 128, kPoolPixels = 64;

struct PoolArgs {
  const void* x = nullptr;  // (n, pixels, c_in)
  const unsigned char* packed = nullptr;
  void* pooled = nullptr;  // (n, whole chunks of c_last), zeros beyond c_last
  int64_t n, pixels;
  int32_t c_in, c_last, images;
  float lo, hi;
  bool vectors_in, together;
  int32_t groups, at_once;     // steps of the sum; of them those whose values lie in shared memory together
  int32_t chunk, expand_bias;  // bytes
  int32_t x_pitch;
};

// The classifier: a thread block takes 16 images and 32 classes, a warp a share of the sum. Weights and pooled values
// of `at_once` steps lie in the warp's own part of shared memory, and in the end its sums.
constexpr int kClassifyThreads = 256, kClassifyWarps = kClassifyThreads / 32, kClassifyImages = 16;

struct ClassifyArgs {
  const void* pooled = nullptr;  // (n, pooled_row)
  const unsigned char* packed = nullptr;
  void* y = nullptr;  // (n, classes)
  int64_t n;
  int32_t classes, pooled_row;
  int32_t groups, at_once;     // steps of the sum; of a warp's share of them those that are loaded together
  int32_t chunk, expand_bias;  // bytes
  int32_t x_pitch, warp;       // bytes of an image's values and of a warp in shared memory
};

// Packing of weights, a value a thread. Pointers are to contiguous fp32; null: the layout has no such part.
constexpr int kPackThreads = 256;

struct PackArgs {
  const float *expand = nullptr, *expand_bias = nullptr;        // (c_hidden, channels, kernel^2), (c_hidden)
  const float *depthwise = nullptr, *depthwise_bias = nullptr;  // (c_hidden, filter_taps), (c_hidden)
  const float *project = nullptr, *project_bias = nullptr;      // (c_out, c_hidden), (c_out)
  unsigned char* packed = nullptr;
  int32_t channels, kernel, slice;  // of the expansion's windows, see window_values(); kernel 1: of its pixels
  int32_t groups;                   // of 16 values of that sum
  int32_t c_hidden, c_out, filter_taps;
  int32_t parts, tiles;  // of the output channels
  int32_t chunks;
  int64_t first, chunk, expand_bias_at, filters_at, project_at;  // bytes, see BlockLayout
  int64_t chunk_values, values;                                  // of a chunk; of all
};

}  // namespace cuda
}  // namespace mnv2
