// The inverted-residual block: one thread block computes a tile of output pixels, 32 hidden channels at a time. It
// expands the tile and its halo into shared memory, filters them from there into registers, and multiplies these by
// their part of the projection. The projection's sums stay in registers throughout.
#pragma once

#include "filter.cuh"
#include "window.cuh"

namespace mnv2 {
namespace cuda {

// The constants of a variant of the kernel. kTiles: tiles of 8 output channels. A warp holds kRows times 16 output
// pixels, a lane 2 kRows of them: a patch.
template <class M, int kTiles>
struct Block {
  static constexpr int kRows = rows_of_warp(M::kBytes, kTiles);
  static constexpr int kExpandRows = expanded_at_once(M::kBytes, kTiles) / 16;
  static constexpr int kPatchHeight = kRows, kPatchWidth = 2, kPatch = 2 * kRows;
  static constexpr int kThreads = kMostThreads;
  static constexpr int kBlocks = blocks_at_once(M::kFilterBytes, kTiles);
  static constexpr int kValues = kRows * kTiles * 4;  // sums of a thread
};

// A thread's place in its thread block, and in the fragments of its warp: rows g, columns from t.
struct Lane {
  int lane, warp, g, t;
  int warps;  // of the thread block
};

MNV2_DEVICE Lane this_lane(const BlockArgs& a) {
  const int thread = thread_index(), lane = thread % 32;
  return {lane, thread / 32, lane / 4, lane % 4, a.threads / 32};
}

// What a thread block works on.
struct Task {
  int64_t first_image;
  int row, column;              // the tile's first output pixel
  int part, split;              // of the output channels, of the hidden channels
  int first_chunk, last_chunk;  // of the split; the last one is the next split's
};

MNV2_DEVICE Task this_task(const BlockArgs& a) {
  Task task;
  int tile = block_index_x();
  task.column = tile % a.tiles_x * a.tile_w;
  tile /= a.tiles_x;
  task.row = tile % a.tiles_y * a.tile_h;
  task.first_image = static_cast<int64_t>(tile / a.tiles_y) * a.images;
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

// Where an input pixel of the tile comes from and goes to; -1: nowhere. `from` is below 2^31: a tile has less than 2^11
// rows, of at most 2^20 pixels.
struct PixelPlace {
  int32_t from;  // pixels from the first one of the tile's first row; of a stem: bytes in x_tile to a window
  int32_t to;    // bytes in the expanded tile
};

template <class M>
MNV2_DEVICE void find_places(const BlockArgs& a, const Task& task, const TileInput& in, PixelPlace* places) {
  MNV2_NO_UNROLL
  for (int i = thread_index(); i < in.rows; i += a.threads) {
    PixelPlace place{a.windows ? 0 : -1, -1};
    if (i < in.pixels) {
      const int image = a.images == 1 ? 0 : i / (in.height * in.width), rest = i - image * in.height * in.width;
      const int row = rest / in.width, column = rest - row * in.width + in.column;
      if (a.windows) {
        place.from = image * a.window.image + window_at<M>(a.window, row, column - in.column, a.window.c);
      } else if (task.first_image + image < a.n) {
        place.from = (image * a.h + row) * a.w + column;
      }
      place.to = image * a.e_image + (in.row + row - in.origin_row) * a.e_pitch +
                 (column - in.origin_column) * Expanded<M>::kPixel;
    }
    places[i] = place;
  }
}

MNV2_DEVICE void zero_expanded(const BlockArgs& a, unsigned char* expanded) {
  const int vectors = a.e_image * a.images / 16;
  MNV2_NO_UNROLL
  for (int i = thread_index(); i < vectors; i += a.threads) reinterpret_cast<Four*>(expanded)[i] = {0, 0, 0, 0};
}

MNV2_DEVICE void copy_bytes(const BlockArgs& a, unsigned char* to, const unsigned char* from, int bytes) {
  MNV2_NO_UNROLL
  for (int i = thread_index() * 16; i < bytes; i += a.threads * 16) copy_async(to + i, from + i, true);
}

// The chunk's weights for this part of the output.
MNV2_DEVICE void copy_weights(const BlockArgs& a, int chunk, int part, unsigned char* to) {
  const unsigned char* const from = a.packed + a.first + static_cast<int64_t>(chunk) * a.chunk;
  copy_bytes(a, to, a.expand + static_cast<int64_t>(chunk) * a.expand_chunk, a.filters);
  copy_bytes(a, to + a.filters, from + a.filters_from, a.project - a.filters);
  copy_bytes(a, to + a.project, from + a.project_from + static_cast<int64_t>(part) * a.project_part, a.project_part);
}

// The tiles of all images that a stem's windows lie in.
template <class M>
MNV2_DEVICE void load_images(const BlockArgs& a, const Task& task, const TileInput& in, unsigned char* x_tile) {
  if (in.pixels == 0) return;
  for (int i = 0; i < a.images && task.first_image + i < a.n; ++i)
    load_windows<M, 5>(a.window, x_tile + i * a.window.image, task.first_image + i, in.row, in.column, in.height,
                       in.width, 0, a.window.c, a.threads);
}

// The pixels that the expansion multiplies. x: of the tile's first row.
template <class M>
MNV2_DEVICE void load_pixels(const BlockArgs& a, const TileInput& in, const PixelPlace* places,
                             const typename M::Value* x, unsigned char* x_tile) {
  const int vectors = a.groups * M::kBytes;  // 16 bytes of a pixel
  MNV2_NO_UNROLL
  for (int i = thread_index(); i < in.rows * vectors; i += a.threads) {
    const int pixel = i / vectors, vector = i - pixel * vectors;
    const int from = places[pixel].from;
    unsigned char* const to = x_tile + pixel * a.x_pitch + vector * 16;
    constexpr int kValues = 16 / M::kBytes;
    copy_vector(to, x + static_cast<int64_t>(from < 0 ? 0 : from) * a.c_in, vector * kValues, a.c_in, from >= 0,
                a.vectors_in);
  }
  copy_async_commit();
}

// Without an expansion: a chunk's channels of the pixels, to the tile that the filter reads.
template <class M>
MNV2_DEVICE void load_chunk(const BlockArgs& a, int chunk, const TileInput& in, const PixelPlace* places,
                            const typename M::Value* x, unsigned char* expanded) {
  using E = Expanded<M>;
  constexpr int kVectors = 2 * M::kBytes, kValues = 16 / M::kBytes;
  MNV2_NO_UNROLL
  for (int i = thread_index(); i < in.pixels * kVectors; i += a.threads) {
    const PixelPlace place = places[i / kVectors];
    const int vector = i % kVectors;
    const int at = E::kVectors == 1 ? vector * 16 : vector % 2 * E::kVector + vector / 2 * 16;
    copy_vector(expanded + place.to + at, x + static_cast<int64_t>(place.from < 0 ? 0 : place.from) * a.c_in,
                chunk * 32 + vector * kValues, a.c_in, place.from >= 0, a.vectors_in);
  }
  copy_async_commit();
}

// A lane's eight neighbouring channels of an expanded pixel.
template <class M>
MNV2_DEVICE void store_expanded(unsigned char* to, const float (&values)[8]) {
  using T = typename M::Value;
  if constexpr (Expanded<M>::kVectors == 1) {
    store_values(reinterpret_cast<T*>(to), values);
  } else {
    const float low[4] = {values[0], values[1], values[2], values[3]};
    const float high[4] = {values[4], values[5], values[6], values[7]};
    store_values(reinterpret_cast<T*>(to), low);
    store_values(reinterpret_cast<T*>(to + Expanded<M>::kVector), high);
  }
}

// A chunk of hidden channels of all the tile's pixels, clamped.
template <class M, class B>
MNV2_DEVICE void expand_chunk(const BlockArgs& a, const Lane& l, int chunk, const TileInput& in,
                              const PixelPlace* places, const unsigned char* x_tile, const unsigned char* weights,
                              unsigned char* expanded) {
  const int channels = a.c_hidden - chunk * 32 - l.t * 8;  // of this lane's eight that exist
  MNV2_NO_UNROLL
  for (int block = l.warp; block < in.row_blocks; block += l.warps) {
    float d[B::kExpandRows][4][4];
    set_bias(d, weights + a.expand_bias, l.lane);
    const int first = block * B::kExpandRows * 16 + l.g;
    if (a.windows) {
      int windows[2 * B::kExpandRows];
      MNV2_UNROLL
      for (int i = 0; i < 2 * B::kExpandRows; ++i) windows[i] = places[first + i * 8].from;
      multiply_windows<M>(d, x_tile, windows, x_tile + a.window.table, weights, a.groups, l.lane);
    } else {
      multiply_chunk<M>(d, x_tile + first * a.x_pitch + l.t * 4 * M::kBytes, 8 * a.x_pitch, weights, a.groups, l.lane);
    }
    MNV2_UNROLL
    for (int i = 0; i < 2 * B::kExpandRows; ++i) {
      const int to = places[first + i * 8].to;
      if (to < 0) continue;
      float values[8];
      MNV2_UNROLL
      for (int j = 0; j < 8; ++j) {
        const float value = clamp(d[i / 2][j / 2][i % 2 * 2 + j % 2], a.expand_lo, a.expand_hi);
        values[j] = j < channels ? value : 0.f;  // what is not there must not be NaN either
      }
      store_expanded<M>(expanded + to + l.t * 16, values);
    }
  }
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
  p.image = index / patches;
  const int patch = index - p.image * patches, pair = patch / (2 * a.patch_columns);
  p.row = pair * 2 + patch % 2, p.column = (patch - pair * 2 * a.patch_columns) / 2;
  p.in_tile = p.image < a.images && p.row < a.patch_rows;
  return p;
}

// This lane's channels of the patch's first input pixel.
template <class M, class B>
MNV2_DEVICE const unsigned char* window_of(const BlockArgs& a, const Lane& l, const Patch& p,
                                           const unsigned char* expanded) {
  return expanded + l.t * 16 +
         (p.in_tile ? p.image * a.e_image + p.row * B::kPatchHeight * a.stride * a.e_pitch +
                          p.column * B::kPatchWidth * a.stride * Expanded<M>::kPixel
                    : 0);
}

// sums += filtered x a chunk of the projection. project: this lane's first operands of the chunk.
template <class M, int kTiles, int kRows>
MNV2_DEVICE void project_chunk(float (&sums)[kRows][kTiles][4], const Filtered<M> (&filtered)[2 * kRows],
                               const unsigned char* project) {
  float last[4] = {};
  if constexpr (M::kOperand == 2) {
    Rows<M> rows[2][kRows];
    MNV2_UNROLL
    for (int row = 0; row < kRows; ++row) {
      MNV2_UNROLL
      for (int half = 0; half < 2; ++half)
        rows[half][row].set(filtered[2 * row].half[half], filtered[2 * row + 1].half[half]);
    }
    MNV2_UNROLL
    for (int tile = 0; tile < kTiles; ++tile) {
      Operand<M> b[2];
      load_operands(project + tile * 512, b);
      MNV2_UNROLL
      for (int half = 0; half < 2; ++half) {
        MNV2_UNROLL
        for (int row = 0; row < kRows; ++row) multiply(sums[row][tile], rows[half][row], b[half], last);
      }
    }
  } else {
    MNV2_UNROLL
    for (int half = 0; half < 2; ++half) {
      Rows<M> rows[kRows];
      MNV2_UNROLL
      for (int row = 0; row < kRows; ++row)
        rows[row].set(filtered[2 * row].half[half], filtered[2 * row + 1].half[half]);
      MNV2_UNROLL
      for (int tile = 0; tile < kTiles; ++tile) {
        warp_barrier();  // else the compiler reads too far ahead and spills
        Operand<M> b;
        load_operands(project + (half * kTiles + tile) * 512, &b);
        MNV2_UNROLL
        for (int row = 0; row < kRows; ++row) multiply(sums[row][tile], rows[row], b, last);
      }
    }
  }
}

// The last of a tile's thread blocks adds up the sums of all splits, in their order. false: this is not the last one,
// and is done. last: shared memory that nothing else uses any more.
template <int kValues>
MNV2_DEVICE bool add_up_splits(const BlockArgs& a, const Task& task, float* sums, int* last) {
  const int thread = thread_index();
  const int64_t place = static_cast<int64_t>(block_index_x()) * a.parts + task.part;
  float* const partial = a.partial + place * a.splits * kValues * a.threads + thread;
  float* const to = partial + static_cast<int64_t>(task.split) * kValues * a.threads;
  MNV2_UNROLL
  for (int i = 0; i < kValues; ++i) to[i * a.threads] = sums[i];
  memory_fence();
  barrier();
  if (thread == 0) {
    *last = atomic_add(a.tickets + place, 1) + 1 == static_cast<uint32_t>(a.splits);
    if (*last) a.tickets[place] = 0;
  }
  barrier();
  if (!*last) return false;
  memory_fence();
  MNV2_UNROLL
  for (int i = 0; i < kValues; ++i) sums[i] = 0.f;
  for (int s = 0; s < a.splits; ++s) {
    const float* const from = partial + static_cast<int64_t>(s) * kValues * a.threads;
    MNV2_UNROLL
    for (int i = 0; i < kValues; ++i) {
      if (i % 16 == 0) warp_barrier();  // else the compiler reads too far ahead and spills
      sums[i] += load_shared_result(from + i * a.threads);
    }
  }
  return true;
}

// Tiles that lie side by side in a lane's registers: four, or of the last ones two or one.
MNV2_DEVICE constexpr int tiles_from(int tile, int tiles) { return tiles - tile >= 4 ? 4 : tiles - tile >= 2 ? 2 : 1; }

// Tiles [kFirst, kTiles) of an output pixel: sums, biases and residual to memory. A lane has 2 kCount neighbouring
// channels of kCount neighbouring tiles. bias, residual and y: of the thread block's first output channel.
template <class M, int kTiles, int kFirst>
MNV2_DEVICE void store_pixel(const BlockArgs& a, const float (&sums)[kTiles][4], int half, int t, int channels,
                             const float* bias, const typename M::Value* residual, typename M::Value* y) {
  if constexpr (kFirst < kTiles) {
    constexpr int kCount = tiles_from(kFirst, kTiles);
    const int channel = kFirst * 8 + t * 2 * kCount;
    float values[2 * kCount];
    MNV2_UNROLL
    for (int i = 0; i < 2 * kCount; ++i)
      values[i] = sums[kFirst + i / 2][2 * half + i % 2] + load_constant(bias + channel + i);
    if (a.clamps_out) {
      MNV2_UNROLL
      for (int i = 0; i < 2 * kCount; ++i) values[i] = clamp(values[i], a.out_lo, a.out_hi);
    }
    if (residual != nullptr) {
      MNV2_UNROLL
      for (int i = 0; i < 2 * kCount; ++i)
        if (channel + i < channels) values[i] += load_value(residual + channel + i);
    }
    if (a.vectors_out) {
      if (channel < channels) store_values(y + channel, values);
    } else {
      MNV2_UNROLL
      for (int i = 0; i < 2 * kCount; ++i)
        if (channel + i < channels) store_value(y + channel + i, values[i]);
    }
    store_pixel<M, kTiles, kFirst + kCount>(a, sums, half, t, channels, bias, residual, y);
  }
}

// A lane's patch: residuals are in x_tile, or without an expansion in x.
template <class M, int kTiles>
MNV2_DEVICE void store_patch(const BlockArgs& a, const Task& task, const TileInput& in, const Lane& l, const Patch& p,
                             const float (&sums)[Block<M, kTiles>::kRows][kTiles][4], const typename M::Value* x,
                             const unsigned char* x_tile) {
  using B = Block<M, kTiles>;
  using T = typename M::Value;
  if (!p.in_tile || task.first_image + p.image >= a.n) return;
  const int first_channel = task.part * kTiles * 8, channels = a.c_out - first_channel;
  const float* const bias = reinterpret_cast<const float*>(a.packed) + first_channel;
  MNV2_UNROLL
  for (int i = 0; i < B::kPatch; ++i) {
    const int tile_row = p.row * B::kPatchHeight + i / B::kPatchWidth, row = task.row + tile_row;
    const int tile_column = p.column * B::kPatchWidth + i % B::kPatchWidth, column = task.column + tile_column;
    if (tile_row >= a.tile_h || tile_column >= a.tile_w || row >= a.h_out || column >= a.w_out) continue;
    const T* residual = nullptr;
    if (a.residual && a.has_expand) {
      const int pixel = (p.image * in.height + row - in.row) * in.width + column - in.column;
      residual = reinterpret_cast<const T*>(x_tile + pixel * a.x_pitch) + first_channel;
    } else if (a.residual) {
      const int64_t pixel = static_cast<int64_t>(p.image * a.h + row - in.row) * a.w + column;
      residual = x + pixel * a.c_in + first_channel;
    }
    const int64_t pixel = ((task.first_image + p.image) * a.h_out + row) * a.w_out + column;
    store_pixel<M, kTiles, 0>(a, sums[i / 2], i % 2, l.t, channels, bias, residual,
                              static_cast<T*>(a.y) + pixel * a.c_out + first_channel);
  }
}

template <class M, int kTiles, int kFilter>
MNV2_KERNEL(Block<M, kTiles>::kThreads, Block<M, kTiles>::kBlocks)
block_kernel(const BlockArgs a) {
  using B = Block<M, kTiles>;
  using T = typename M::Value;
  unsigned char* const shared = shared_memory();
  unsigned char* const x_tile = shared + a.x_at;
  unsigned char* const expanded = shared + a.e_at;
  PixelPlace* const places = reinterpret_cast<PixelPlace*>(shared + a.table_at);
  const Lane lane = this_lane(a);
  const Task task = this_task(a);

  copy_weights(a, task.first_chunk, task.part, shared + a.weights_at);
  copy_async_commit();
  const TileInput in = tile_input<B>(a, task);
  find_places<M>(a, task, in, places);
  if (a.windows) find_pairs<M>(a.window, x_tile + a.window.table, a.window.c, a.threads);
  zero_expanded(a, expanded);  // beyond the image's edge the filter reads zeros
  barrier();

  wait_for_previous_kernel();
  allow_next_kernel();

  const T* const x = static_cast<const T*>(a.x) + (task.first_image * a.h + in.row) * a.w * a.c_in;
  if (a.windows)
    load_images<M>(a, task, in, x_tile);
  else if (a.has_expand)
    load_pixels<M>(a, in, places, x, x_tile);
  const Patch patch = this_patch(a, lane);
  const unsigned char* const window = window_of<M, B>(a, lane, patch, expanded);

  float sums[B::kRows][kTiles][4];
  MNV2_UNROLL
  for (int i = 0; i < B::kValues; ++i) (&sums[0][0][0])[i] = 0.f;

  for (int chunk = task.first_chunk; chunk < task.last_chunk; ++chunk) {
    const unsigned char* const weights = shared + a.weights_at + (chunk - task.first_chunk) % 2 * a.weights_bytes;
    if (!a.has_expand) load_chunk<M>(a, chunk, in, places, x, expanded);
    copy_async_wait<0>();
    barrier();  // weights and pixels are there, and the expanded tile is free
    if (chunk + 1 < task.last_chunk && a.weights_bytes > 0) {
      copy_weights(a, chunk + 1, task.part,
                   shared + a.weights_at + (chunk + 1 - task.first_chunk) % 2 * a.weights_bytes);
      copy_async_commit();
    }
    if (a.has_expand) {
      expand_chunk<M, B>(a, lane, chunk, in, places, x_tile, weights, expanded);
      barrier();
    }

    Filtered<M> filtered[B::kPatch];
    filter_patch<M, B::kPatchHeight, B::kPatchWidth, kFilter>(
        a, window, weights + a.filters + lane.t * 8 * M::kFilterBytes,
        weights + a.filter_bias + lane.t * 8 * M::kFilterBytes, filtered);
    project_chunk<M, kTiles>(sums, filtered, weights + a.project + lane.lane * 16);
    if (!a.has_expand) barrier();  // before the expanded tile is filled again
    if (chunk + 1 < task.last_chunk && a.weights_bytes == 0) {
      if (a.has_expand) barrier();  // before the only place for weights is
      copy_weights(a, chunk + 1, task.part, shared + a.weights_at);
      copy_async_commit();
    }
  }

  if (a.splits > 1 && !add_up_splits<B::kValues>(a, task, &sums[0][0][0], reinterpret_cast<int*>(places))) return;
  store_patch<M, kTiles>(a, task, in, lane, patch, sums, x, x_tile);
}

}  // namespace cuda
}  // namespace mnv2
