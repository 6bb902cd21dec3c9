// The shape of a block's tile in patches and in shared memory, and the limits of what kernels count. For plans, costs
// and arguments; callers of these need plan.h alone.
#pragma once

#include <algorithm>

#include "args.h"
#include "plan.h"

namespace mnv2 {
namespace cuda {

constexpr int64_t kMostTile = 32;               // pixels, either way
constexpr int64_t kMostCluster = 8;             // thread blocks: what every GPU that has clusters takes
constexpr int64_t kMostRounds = 32;             // of a thread block, one after the other
constexpr int64_t kMostPoolImages = 8;          // of a thread block of the head
constexpr int64_t kUnfit = int64_t{1} << 30;    // bytes: more than any thread block has
constexpr int64_t kTooMany = int64_t{1} << 31;  // thread blocks of a launch, pixels and bytes that kernels count

// All are the counts and bytes of one thread block.
struct Tile {
  int64_t height, width, images;  // output pixels
  int64_t patch_rows, patch_columns, patches;
  int64_t e_pitch, e_image, e_height;
  int64_t pixels;  // expanded, rounded up to the pixels of one product
  int64_t table, weights, x, shared;
  int64_t weights_at;  // where they begin, and in the end a cluster's sums: behind the input, for the residual
  int64_t e;           // the expanded tile, and behind it a pixel for rows that do not count
};

// stem: of which the block is joined(), or null.
Tile make_tile(const BlockShape& shape, const DenseShape* stem, DType dtype, const Columns& columns, int64_t height,
               int64_t width, int64_t images, int64_t buffers, bool ahead);

// A tile of an image that rows x columns windows of a convolution lie in.
struct WindowTile {
  int64_t height, width;  // pixels
  int64_t pitch;          // bytes of a row
  int64_t shifted;        // bytes from the tile to its copy, see window.cuh; 0: there is none
  int64_t image;          // bytes with the copy
  int64_t table;          // bytes of the table of pairs
};

WindowTile window_tile(const DenseShape& stem, DType dtype, int64_t rows, int64_t columns);

// WindowArgs::lanes of a tile whose rows have so many values.
int row_lanes(int64_t values);

// Output pixels of a thread block of the stem alone.
struct StemTile {
  int64_t height, width;
  int64_t shared;  // bytes
};

StemTile stem_tile(const DenseShape& stem, DType dtype, int64_t shared_block);

// threads_at_once() of a block's kernel.
int64_t threads_of(DType dtype, const Columns& columns, const Device& device);

// Whether the block's kernel takes several rounds of so many images, with so many splits.
bool takes_rounds(DType dtype, const Columns& columns, int64_t images, int64_t splits);

// Pixels that a warp expands at a time.
int64_t expand_rows(DType dtype, const Columns& columns);

// Steps of the expansion's sum.
inline int64_t groups(const BlockShape& s) { return s.has_expand ? divide_up(s.c_in, kGroup) : 0; }

// Bytes of a pixel's row in shared memory: the rows that are read at once use different banks. In 16 bits these are 16
// bytes of eight rows, otherwise 64 of two.
inline int64_t row_pitch(int64_t channels, DType dtype) {
  const int64_t groups = divide_up(channels, kGroup);
  return element_bytes(dtype) == 2 ? groups * 32 + 16 : (groups | 1) * 64;
}

// Whether a launch of so many thread blocks is allowed.
inline bool blocks_fit(int64_t of_image, int64_t images) {
  return static_cast<double>(of_image) * static_cast<double>(images) < static_cast<double>(kTooMany);
}

}  // namespace cuda
}  // namespace mnv2
