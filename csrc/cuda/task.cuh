// What a thread block of the block's kernel works on, and what of it belongs to a lane.
#pragma once

#include "tile.cuh"

namespace mnv2 {
namespace cuda {

// The constants of a variant of the kernel. kTiles: tiles of 8 output channels. A warp holds kRows times 16 output
// pixels, a lane 2 kRows of them: a patch.
template <class M, int kTiles>
struct Block {
  static constexpr int kRows = rows_of_warp(M::kBytes, kTiles);
  static constexpr int kExpandRows = expanded_at_once(M::kBytes, kTiles) / 16;
  static constexpr int kPatchHeight = kRows, kPatchWidth = 2, kPatch = 2 * kRows;
  static constexpr bool kRounds = takes_rounds(M::kBytes, kTiles);
  static constexpr int kThreads = threads_at_once(M::kFilterBytes, kTiles, kHasClusters);
  static constexpr int kValues = kRows * kTiles * 4;  // sums of a thread
};

// A thread's place in its thread block, and in the fragments of its warp: rows g, columns from t.
struct Lane {
  int lane, warp, g, t;
  int warps;  // of the thread block
};

MNV2_DEVICE Lane this_lane(const BlockArgs& a, int thread) {
  const int lane = thread & 31;
  return {lane, thread >> 5, lane >> 2, lane & 3, a.threads >> 5};
}

// What a thread block works on.
struct Task {
  int first_image, end_image;   // of all rounds
  int row, column;              // the tile's first output pixel
  int part, split;              // of the output channels, of the hidden channels
  int first_chunk, last_chunk;  // of the split; the last one is the next split's
};

// tile: block_index_x().
MNV2_DEVICE Task this_task(const BlockArgs& a, int tile) {
  Task task;
  task.column = tile % a.tiles_x * a.tile_w;
  tile /= a.tiles_x;
  task.row = tile % a.tiles_y * a.tile_h;
  const int of_block = a.rounds * a.images;
  task.first_image = tile / a.tiles_y * of_block;
  task.end_image = a.n - task.first_image < of_block ? static_cast<int>(a.n) : task.first_image + of_block;
  task.part = block_index_y(), task.split = block_index_z();
  task.first_chunk = 0, task.last_chunk = a.chunks;
  if (a.splits > 1) {  // at most 2^15 chunks and 32 splits
    task.first_chunk = a.chunks * task.split / a.splits;
    task.last_chunk = a.chunks * (task.split + 1) / a.splits;
  }
  return task;
}

// The tile's input pixels that lie in the image, row by row: those that are expanded.
struct TileInput {
  int origin_row, origin_column;  // the first pixel that the filter reads; it may lie outside the image
  int row, column;                // first
  int height, width;              // may be empty
  int pixels;                     // of all images
  int row_blocks, rows;           // products that expand them, and the rows of these: `pixels` or more
};

template <class B>
MNV2_DEVICE TileInput tile_input(const BlockArgs& a, const Task& task) {
  const int extent = (a.kernel - 1) * a.dilation + 1;
  const int rows = a.h_out - task.row < a.tile_h ? a.h_out - task.row : a.tile_h;
  const int columns = a.w_out - task.column < a.tile_w ? a.w_out - task.column : a.tile_w;
  TileInput in;
  in.origin_row = task.row * a.stride - a.pad_top, in.origin_column = task.column * a.stride - a.pad_left;
  const int end_row = in.origin_row + (rows - 1) * a.stride + extent;
  const int end_column = in.origin_column + (columns - 1) * a.stride + extent;
  in.row = in.origin_row > 0 ? in.origin_row : 0;
  in.column = in.origin_column > 0 ? in.origin_column : 0;
  in.height = (end_row < a.h ? end_row : a.h) - in.row;
  in.width = (end_column < a.w ? end_column : a.w) - in.column;
  if (in.height < 0 || in.width < 0) in.height = in.width = 0;
  in.pixels = in.height * in.width * a.images;
  in.row_blocks = (in.pixels + B::kExpandRows * 16 - 1) / (B::kExpandRows * 16);
  in.rows = in.row_blocks * B::kExpandRows * 16;
  return in;
}

// The first pixel of the tile's first row in an image.
template <class T>
MNV2_DEVICE const T* first_row(const BlockArgs& a, int image, const TileInput& in) {
  return static_cast<const T*>(a.x) + image * a.x_image + static_cast<int64_t>(in.row * a.w) * a.c_in;
}

// The output pixels of a lane.
struct Patch {
  int image, row, column;  // in patches, of the tile
  bool in_tile;
};

MNV2_DEVICE Patch this_patch(const BlockArgs& a, const Lane& l) {
  const int pairs = (a.patch_rows + 1) / 2, patches = pairs * 2 * a.patch_columns;
  const int index = l.warp * 8 + l.g;
  Patch p;
  p.image = a.images == 1 ? index >= patches : Divisor{a.per_patches}.quotient(index);
  const int patch = index - p.image * patches, pair = Divisor{a.per_pair}.quotient(patch);
  p.row = pair * 2 + (patch & 1), p.column = (patch - pair * 2 * a.patch_columns) >> 1;
  p.in_tile = p.image < a.images && p.row < a.patch_rows;
  return p;
}

}  // namespace cuda
}  // namespace mnv2
