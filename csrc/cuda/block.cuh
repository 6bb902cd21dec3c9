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
  static constexpr int kThreads = threads_at_once(M::kFilterBytes, kTiles, kHasClusters);
  static constexpr int kValues = kRows * kTiles * 4;  // sums of a thread
};

// A thread's place in its thread block, and in the fragments of its warp: rows g, columns from t.
struct Lane {
  int lane, warp, g, t;
  int warps;  // of the thread block
};

MNV2_DEVICE Lane this_lane(const BlockArgs& a, int thread) {
  const int lane = thread % 32;
  return {lane, thread / 32, lane / 4, lane % 4, a.threads / 32};
}

// What a thread block works on.
struct Task {
  int64_t first_image;
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

// The first pixel of the tile's first row in the image.
template <class T>
MNV2_DEVICE const T* first_row(const BlockArgs& a, const Task& task, const TileInput& in) {
  return static_cast<const T*>(a.x) + (task.first_image * a.h + in.row) * a.w * a.c_in;
}

// Where the rows of the products come from and go to: the tile's input pixels, then rows that do not count. They go
// behind the expanded tile.
struct Places {
  // Pixels from the first one of the tile's first row, below 2^31; -1: from nowhere. Of a stem: bytes in x_tile to a
  // window, in the order of place_to().
  int32_t* from;
  int32_t* to;  // bytes in the expanded tile, in the order of place_to()
};

// Rows in the order of lanes: those that a lane has of a product are neighbours.
template <class B>
MNV2_DEVICE int place_to(int row) {
  constexpr int kRows = B::kExpandRows * 2;
  return row / (kRows * 8) * (kRows * 8) + row % 8 * kRows + row / 8 % kRows;
}

template <class M, class B>
MNV2_DEVICE void find_places(const BlockArgs& a, const Task& task, const TileInput& in, const Places& places) {
  const int of_image = in.height * in.width;
  const Divisor images(of_image), rows(in.width);
  MNV2_NO_UNROLL
  for (int i = thread_index(); i < in.rows; i += a.threads) {
    int32_t from = a.windows ? 0 : -1, to = a.e_image * a.images;
    if (i < in.pixels) {
      const int image = a.images == 1 ? 0 : images.quotient(i), rest = i - image * of_image;
      const int row = rows.quotient(rest), column = rest - row * in.width + in.column;
      if (a.windows) {
        from = image * a.window.image + window_at<M>(a.window, row, column - in.column, a.window.c);
      } else if (task.first_image + image < a.n) {
        from = (image * a.h + row) * a.w + column;
      }
      to = image * a.e_image + (in.row + row - in.origin_row) * a.e_pitch +
           (column - in.origin_column) * Expanded<M>::kPixel;
    }
    const int place = place_to<B>(i);
    places.from[a.windows ? place : i] = from, places.to[place] = to;
  }
}

MNV2_DEVICE void zero_expanded(const BlockArgs& a, unsigned char* expanded) {
  const int vectors = a.e_image * a.images / 16;
  MNV2_NO_UNROLL
  for (int i = thread_index(); i < vectors; i += a.threads) reinterpret_cast<Four*>(expanded)[i] = {0, 0, 0, 0};
}

// A copy of part of a chunk's weights: by all threads, or in bulk.
MNV2_DEVICE void copy_bytes(const BlockArgs& a, unsigned char* to, const unsigned char* from, int bytes,
                            Arrival* arrival) {
  if (bulk_copies()) {
    if (bytes > 0) copy_bulk(to, from, bytes, arrival);
    return;
  }
  MNV2_NO_UNROLL
  for (int i = thread_index() * 16; i < bytes; i += a.threads * 16) copy_async(to + i, from + i, true);
}

// A step expands one of the task's chunks, and filters and projects one: the same or, if `a.ahead`, the one before.
struct Step {
  int expanded, filtered;
  bool expands, filters;  // whether the task has these chunks
};

MNV2_DEVICE Step this_step(const BlockArgs& a, const Task& task, int step) {
  const int filtered = a.ahead ? step - 1 : step;
  return {step, filtered, step < task.last_chunk - task.first_chunk, filtered >= 0};
}

// The places for weights of a step: chunk by chunk in turn.
MNV2_DEVICE int weights_of(const BlockArgs& a, int number) { return a.weights_at + number % 2 * a.weights_bytes; }

// Steps count their weights in turn, too.
MNV2_DEVICE Arrival* arrival_of(int step, unsigned char* shared) {
  return reinterpret_cast<Arrival*>(shared) + step % 2;
}

// In bulk a thread of the last warp copies, which has the fewest pixels to expand.
MNV2_DEVICE bool copies_in_bulk(const BlockArgs& a) { return bulk_copies() && thread_index() == a.threads - 32; }

// The step's weights, for this part of the output.
MNV2_DEVICE void copy_weights(const BlockArgs& a, const Task& task, int number, unsigned char* shared) {
  if (bulk_copies() && !copies_in_bulk(a)) return;
  const Step step = this_step(a, task, number);
  const int expand = step.expands ? a.filters : 0, rest = step.filters ? a.project - a.filters : 0;
  const int project = step.filters ? a.project_part : 0;
  Arrival* const arrival = arrival_of(number, shared);
  if (bulk_copies()) expect_bytes(arrival, expand + rest + project);
  copy_bytes(a, shared + weights_of(a, step.expanded),
             a.expand + static_cast<int64_t>(task.first_chunk + step.expanded) * a.expand_chunk, expand, arrival);
  const unsigned char* const from =
      a.packed + a.first + static_cast<int64_t>(task.first_chunk + step.filtered) * a.chunk;
  unsigned char* const to = shared + weights_of(a, step.filtered);
  copy_bytes(a, to + a.filters, from + a.filters_from, rest, arrival);
  copy_bytes(a, to + a.project, from + a.project_from + static_cast<int64_t>(task.part) * a.project_part, project,
             arrival);
  if (!bulk_copies()) copy_async_commit();
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
MNV2_DEVICE void load_pixels(const BlockArgs& a, const TileInput& in, const Places& places, const typename M::Value* x,
                             unsigned char* x_tile) {
  const int vectors = a.groups * M::kBytes;  // 16 bytes of a pixel
  const Divisor pixels(vectors);
  MNV2_NO_UNROLL
  for (int i = thread_index(); i < in.rows * vectors; i += a.threads) {
    const int pixel = pixels.quotient(i), vector = i - pixel * vectors;
    const int from = places.from[pixel];
    unsigned char* const to = x_tile + pixel * a.x_pitch + vector * 16;
    constexpr int kValues = 16 / M::kBytes;
    copy_vector(to, x + static_cast<int64_t>(from < 0 ? 0 : from) * a.c_in, vector * kValues, a.c_in, from >= 0,
                a.vectors_in);
  }
  copy_async_commit();
}

// Without an expansion: a chunk's channels of the pixels, to the tile that the filter reads.
template <class M, class B>
MNV2_DEVICE void load_chunk(const BlockArgs& a, int chunk, const TileInput& in, const Places& places,
                            const typename M::Value* x, unsigned char* expanded) {
  using E = Expanded<M>;
  constexpr int kVectors = 2 * M::kBytes, kValues = 16 / M::kBytes;
  MNV2_NO_UNROLL
  for (int i = thread_index(); i < in.pixels * kVectors; i += a.threads) {
    const int from = places.from[i / kVectors], to = places.to[place_to<B>(i / kVectors)];
    const int vector = i % kVectors;
    const int at = E::kVectors == 1 ? vector * 16 : vector % 2 * E::kVector + vector / 2 * 16;
    copy_vector(expanded + to + at, x + static_cast<int64_t>(from < 0 ? 0 : from) * a.c_in,
                chunk * 32 + vector * kValues, a.c_in, from >= 0, a.vectors_in);
  }
  copy_async_commit();
}

// Sums of a product to the expanded tile, clamped. to: this lane's first channel of each of its rows. channels: those
// of this lane's eight that exist; what is not there must not be NaN either. common: all exist, the lower bound is 0.
template <bool kExact, int kM>
MNV2_DEVICE void store_expanded(const BlockArgs& a, const float (&d)[kM][4][4], unsigned char* const (&to)[2 * kM],
                                int channels, bool, FloatMath<kExact>) {
  MNV2_UNROLL
  for (int i = 0; i < 4 * kM; ++i) {
    float values[4];
    MNV2_UNROLL
    for (int j = 0; j < 4; ++j) {
      const float value = clamp(d[i / 4][i % 2 * 2 + j / 2][i / 2 % 2 * 2 + j % 2], a.expand_lo, a.expand_hi);
      values[j] = i % 2 * 4 + j < channels ? value : 0.f;
    }
    store_values(reinterpret_cast<float*>(to[i / 2] + i % 2 * Expanded<FloatMath<kExact>>::kVector), values);
  }
}
// Rounding keeps the order of numbers, so values and bounds may be rounded before the clamp.
template <class T, int kM>
MNV2_DEVICE void store_expanded(const BlockArgs& a, const float (&d)[kM][4][4], unsigned char* const (&to)[2 * kM],
                                int channels, bool common, Math16<T>) {
  const uint32_t most = pack<T>(a.expand_hi, a.expand_hi);
  uint32_t words[2 * kM][4];
  if (common) {
    MNV2_UNROLL
    for (int i = 0; i < 8 * kM; ++i) {
      const float* const pair = &d[i / 8][i % 4][i / 4 % 2 * 2];
      words[i / 4][i % 4] = min_pair<T>(pack_relu<T>(pair[0], pair[1]), most);
    }
  } else {
    const uint32_t least = pack<T>(a.expand_lo, a.expand_lo);
    MNV2_UNROLL
    for (int i = 0; i < 8 * kM; ++i) {
      const float* const pair = &d[i / 8][i % 4][i / 4 % 2 * 2];
      const uint32_t word = min_pair<T>(max_pair<T>(pack<T>(pair[0], pair[1]), least), most);
      words[i / 4][i % 4] = i % 4 * 2 + 1 < channels ? word : i % 4 * 2 < channels ? word & 0xffffu : 0u;
    }
  }
  MNV2_UNROLL
  for (int i = 0; i < 2 * kM; ++i)
    *reinterpret_cast<Four*>(to[i]) = {words[i][0], words[i][1], words[i][2], words[i][3]};
}

// A chunk of hidden channels of all the tile's pixels, clamped.
template <class M, class B>
MNV2_DEVICE void expand_chunk(const BlockArgs& a, const Lane& l, int chunk, const TileInput& in, const Places& places,
                              const unsigned char* x_tile, const unsigned char* weights, unsigned char* expanded) {
  const int channels = a.c_hidden - chunk * 32;
  const bool common = a.expand_lo == 0.f && channels >= 32;
  MNV2_NO_UNROLL
  for (int block = l.warp; block < in.row_blocks; block += l.warps) {
    float bias[4][4];
    MNV2_UNROLL
    for (int i = 0; i < 4; ++i)
      load_alike(reinterpret_cast<const float*>(weights + a.expand_bias) + l.t * 8 + i * 2, bias[i]);
    float d[B::kExpandRows][4][4];
    const int first = block * B::kExpandRows * 16;
    const int mine = first + l.g * 2 * B::kExpandRows;
    if (a.windows) {
      int32_t windows[2 * B::kExpandRows];
      load_words(places.from + mine, windows);
      const WindowRows<M, B::kExpandRows> rows(x_tile, windows, x_tile + a.window.table, l.lane);
      multiply_from<M>(d, bias, rows, weights, a.groups, l.lane);
    } else {
      multiply_from<M>(d, bias, TileRows<M>(x_tile + first * a.x_pitch, a.x_pitch, l.lane), weights, a.groups, l.lane);
    }
    int32_t places_to[2 * B::kExpandRows];
    load_words(places.to + mine, places_to);
    unsigned char* to[2 * B::kExpandRows];
    MNV2_UNROLL
    for (int i = 0; i < 2 * B::kExpandRows; ++i) to[i] = expanded + places_to[i] + l.t * 16;
    store_expanded(a, d, to, channels - l.t * 8, common, M{});
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
  p.image = a.images == 1 ? index >= patches : Divisor(patches).quotient(index);
  const int patch = index - p.image * patches, pair = Divisor(2 * a.patch_columns).quotient(patch);
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
        for (int row = 0; row < kRows; ++row)
          multiply(sums[row][tile], sums[row][tile], rows[half][row], b[half], last);
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
        for (int row = 0; row < kRows; ++row) multiply(sums[row][tile], sums[row][tile], rows[row], b, last);
      }
    }
  }
}

// Zeros for the tickets of the blocks after this one, from the launch's first thread block.
MNV2_DEVICE void clear_tickets(const BlockArgs& a) {
  if (block_index_x() != 0 || block_index_y() != 0) return;
  MNV2_NO_UNROLL
  for (int i = thread_index(); i < a.clears; i += a.threads) a.tickets[i] = 0;
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
  // Causality order runs through barriers and the tickets' releases and acquires alike: all stores above come before
  // the last thread block's loads below, though thread 0 alone takes a ticket.
  barrier();
  if (thread == 0) {
    *last = ordered_add(a.tickets + place, 1) + 1 == static_cast<uint32_t>(a.splits);
    if (*last) a.tickets[place] = 0;
  }
  barrier();
  if (!*last) return false;
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

// Each warp adds up the sums of all splits of a cluster, in their order, for one block of it: a warp of each. false:
// another block has the sums of this warp's pixels. own: the block's shared memory for sums, no longer in other use.
template <int kValues>
MNV2_DEVICE bool add_up_cluster(const BlockArgs& a, const Task& task, const Lane& l, float* sums, float* own) {
  float* const mine = own + thread_index() * 4;
  MNV2_UNROLL
  for (int i = 0; i < kValues; i += 4)
    *reinterpret_cast<Four*>(mine + i * a.threads) = {float_to_bits(sums[i]), float_to_bits(sums[i + 1]),
                                                      float_to_bits(sums[i + 2]), float_to_bits(sums[i + 3])};
  cluster_barrier();
  const bool stores = l.warp % a.splits == task.split;
  if (stores) {
    MNV2_UNROLL
    for (int i = 0; i < kValues; ++i) sums[i] = 0.f;
    MNV2_NO_UNROLL
    for (int split = 0; split < a.splits; ++split) {
      MNV2_UNROLL
      for (int i = 0; i < kValues; i += 4) {
        if (i % 32 == 0) warp_barrier();  // else the compiler reads too far ahead and spills
        float values[4];
        load_from_block(mine + i * a.threads, split, values);
        MNV2_UNROLL
        for (int j = 0; j < 4; ++j) sums[i + j] += values[j];
      }
    }
  }
  cluster_barrier();  // before a block ends whose sums others read
  return stores;
}

// Tiles that lie side by side in a lane's registers: four, or of the last ones two or one.
MNV2_DEVICE constexpr int tiles_from(int tile, int tiles) { return tiles - tile >= 4 ? 4 : tiles - tile >= 2 ? 2 : 1; }

// An output pixel of a lane.
template <class T>
struct OutputPixel {
  T* to;         // the thread block's first output channel; null: there is no such pixel
  int residual;  // the input pixel, from the first one in x_tile or, without an expansion, in x
};

// The residual of kCount neighbouring channels is added to `values`. An expansion's input has whole groups of 16
// channels in shared memory, so that it is read in vectors. Two paths, since one pointer to either would be generic,
// and reads through it slow.
template <class T, int kCount>
MNV2_DEVICE void add_residual(const BlockArgs& a, const T* x, const unsigned char* x_tile, int pixel, int channel,
                              float (&values)[kCount]) {
  if (a.has_expand) {
    float residual[kCount];
    load_values(reinterpret_cast<const T*>(x_tile + pixel * a.x_pitch) + channel, residual);
    MNV2_UNROLL
    for (int i = 0; i < kCount; ++i) values[i] += residual[i];
  } else {
    const T* const from = x + static_cast<int64_t>(pixel) * a.c_in + channel;
    MNV2_UNROLL
    for (int i = 0; i < kCount; ++i)
      if (channel + i < a.c_in) values[i] += to_float(load_shared_result(from + i));
  }
}

// Tiles [kFirst, kTiles) of a lane's output pixels: sums, biases and residual to memory. A lane has 2 kCount
// neighbouring channels of kCount neighbouring tiles. first_channel: the thread block's first output channel.
template <class M, int kTiles, int kFirst>
MNV2_DEVICE void store_tiles(const BlockArgs& a, const float (&sums)[Block<M, kTiles>::kRows][kTiles][4], int t,
                             int first_channel, const typename M::Value* x, const unsigned char* x_tile,
                             const OutputPixel<typename M::Value> (&pixels)[Block<M, kTiles>::kPatch]) {
  if constexpr (kFirst < kTiles) {
    constexpr int kCount = tiles_from(kFirst, kTiles);
    const int channel = kFirst * 8 + t * 2 * kCount, channels = a.c_out - first_channel;
    float bias[2 * kCount];
    load_constants(reinterpret_cast<const float*>(a.packed) + first_channel + channel, bias);
    MNV2_UNROLL
    for (int pixel = 0; pixel < Block<M, kTiles>::kPatch; ++pixel) {
      typename M::Value* const to = pixels[pixel].to;
      if (to == nullptr || channel >= channels) continue;
      float values[2 * kCount];
      MNV2_UNROLL
      for (int i = 0; i < 2 * kCount; ++i) values[i] = sums[pixel / 2][kFirst + i / 2][pixel % 2 * 2 + i % 2] + bias[i];
      if (a.clamps_out) {
        MNV2_UNROLL
        for (int i = 0; i < 2 * kCount; ++i) values[i] = clamp(values[i], a.out_lo, a.out_hi);
      }
      if (a.residual) add_residual(a, x, x_tile, pixels[pixel].residual, first_channel + channel, values);
      if (a.vectors_out) {
        store_values(to + channel, values);
      } else {
        MNV2_UNROLL
        for (int i = 0; i < 2 * kCount; ++i)
          if (channel + i < channels) store_value(to + channel + i, values[i]);
      }
    }
    store_tiles<M, kTiles, kFirst + kCount>(a, sums, t, first_channel, x, x_tile, pixels);
  }
}

// A lane's patch: residuals are in x_tile, or without an expansion in x.
template <class M, int kTiles>
MNV2_DEVICE void store_patch(const BlockArgs& a, const Task& task, const Lane& l, const Patch& p,
                             const float (&sums)[Block<M, kTiles>::kRows][kTiles][4], const unsigned char* x_tile) {
  using B = Block<M, kTiles>;
  using T = typename M::Value;
  if (!p.in_tile || task.first_image + p.image >= a.n) return;
  const int first_channel = task.part * kTiles * 8;
  const TileInput in = a.residual ? tile_input<B>(a, task) : TileInput{};
  const int height = a.has_expand ? in.height : a.h, width = a.has_expand ? in.width : a.w;
  const int left = a.has_expand ? in.column : 0;
  OutputPixel<T> pixels[B::kPatch];
  MNV2_UNROLL
  for (int i = 0; i < B::kPatch; ++i) {
    const int tile_row = p.row * B::kPatchHeight + i / B::kPatchWidth, row = task.row + tile_row;
    const int tile_column = p.column * B::kPatchWidth + i % B::kPatchWidth, column = task.column + tile_column;
    pixels[i] = {nullptr, 0};
    if (tile_row >= a.tile_h || tile_column >= a.tile_w || row >= a.h_out || column >= a.w_out) continue;
    const int64_t pixel = ((task.first_image + p.image) * a.h_out + row) * a.w_out + column;
    pixels[i].to = static_cast<T*>(a.y) + pixel * a.c_out + first_channel;
    pixels[i].residual = (p.image * height + row - in.row) * width + column - left;
  }
  store_tiles<M, kTiles, 0>(a, sums, l.t, first_channel, first_row<T>(a, task, in), x_tile, pixels);
}

template <class M, int kTiles, int kFilter>
MNV2_KERNEL(Block<M, kTiles>::kThreads)
block_kernel(const BlockArgs a) {
  using B = Block<M, kTiles>;
  using T = typename M::Value;
  unsigned char* const shared = shared_memory();
  unsigned char* const x_tile = shared + a.x_at;
  unsigned char* const expanded = shared + a.e_at;
  const Lane lane = this_lane(a, thread_index());
  const Task task = this_task(a, block_index_x());

  if (copies_in_bulk(a)) {
    for (int i = 0; i < 2; ++i) start_arrival(reinterpret_cast<Arrival*>(shared) + i);
  }
  copy_weights(a, task, 0, shared);
  const TileInput in = tile_input<B>(a, task);
  int32_t* const table = reinterpret_cast<int32_t*>(shared + a.table_at);
  const Places places{table, table + in.rows};
  find_places<M, B>(a, task, in, places);
  if (a.windows) find_pairs<M>(a.window, x_tile + a.window.table, a.window.c, a.threads);
  zero_expanded(a, expanded);  // beyond the image's edge the filter reads zeros
  if (a.ahead) zero_expanded(a, expanded + a.e_second);
  barrier();

  wait_for_previous_kernel();
  allow_next_kernel();

  if (a.clears > 0) clear_tickets(a);
  const T* const x = first_row<T>(a, task, in);
  if (a.windows)
    load_images<M>(a, task, in, x_tile);
  else if (a.has_expand)
    load_pixels<M>(a, in, places, x, x_tile);
  const unsigned char* const first_window = window_of<M, B>(a, lane, this_patch(a, lane), expanded);

  float sums[B::kRows][kTiles][4];
  MNV2_UNROLL
  for (int i = 0; i < B::kValues; ++i) (&sums[0][0][0])[i] = 0.f;

  // Many sums leave few registers: what follows from the thread's number is computed anew in every step.
  constexpr bool kRecomputes = M::kBytes == 2 && kTiles == 12;
  // If a step's halves do not depend on each other, warps w and w + 4, which share a scheduler, begin with different
  // ones: one of them keeps the tensor cores busy, the other one the rest. Not where it would spill.
  constexpr bool kEitherFirst = M::kBytes == 2 && kFilter != kAnyFilter && !kRecomputes;
  const bool filter_first = kEitherFirst && a.ahead && lane.warp / 4 % 2 != 0;
  const int steps = task.last_chunk - task.first_chunk + (a.ahead ? 1 : 0);
  for (int number = 0; number < steps; ++number) {
    const Step step = this_step(a, task, number);
    const Lane l = kRecomputes ? this_lane(a, forgotten(thread_index())) : lane;
    if (!a.has_expand) load_chunk<M, B>(a, task.first_chunk + number, in, places, x, expanded);
    copy_async_wait<0>();
    if (bulk_copies()) wait_for_arrival(arrival_of(number, shared), number / 2 % 2 != 0);
    barrier();  // weights and pixels are there, and the expanded tile is free
    if (number + 1 < steps && a.weights_bytes > 0) copy_weights(a, task, number + 1, shared);
    const auto expand = [&] {
      if (a.has_expand && step.expands)
        expand_chunk<M, B>(a, l, task.first_chunk + step.expanded, in, places, x_tile,
                           shared + weights_of(a, step.expanded), expanded + step.expanded % 2 * a.e_second);
      if (a.has_expand && !a.ahead) barrier();
    };
    const auto filter = [&] {
      if (!step.filters) return;
      const unsigned char* const weights = shared + weights_of(a, step.filtered);
      Filtered<M> filtered[B::kPatch];
      const unsigned char* const window =
          kRecomputes ? window_of<M, B>(a, l, this_patch(a, l), expanded) : first_window;
      filter_patch<M, B::kPatchHeight, B::kPatchWidth, kFilter>(
          a, window + step.filtered % 2 * a.e_second, weights + a.filters + l.t * 8 * M::kFilterBytes,
          weights + a.filter_bias + l.t * 8 * M::kFilterBytes, filtered);
      project_chunk<M, kTiles>(sums, filtered, weights + a.project + l.lane * 16);
    };
    if constexpr (kEitherFirst) {
      MNV2_NO_UNROLL
      for (int half = 0; half < 2; ++half) {
        if ((half == 0) != filter_first)
          expand();
        else
          filter();
      }
    } else {
      expand();
      filter();
    }
    if (!a.has_expand) barrier();  // before the expanded tile is filled again
    if (number + 1 < steps && a.weights_bytes == 0) {
      if (a.has_expand) barrier();  // before the only place for weights is
      copy_weights(a, task, number + 1, shared);
    }
  }

  if (a.splits > 1) {
    if (kHasClusters && a.cluster) {
      barrier();  // before sums lie where weights and pixels are
      float* const own = reinterpret_cast<float*>(shared + a.weights_at);
      if (!add_up_cluster<B::kValues>(a, task, lane, &sums[0][0][0], own)) return;
    } else if (!add_up_splits<B::kValues>(a, task, &sums[0][0][0], table)) {
      return;
    }
  }
  // So that no register holds these through the steps.
  Task stored = task;
  if constexpr (kRecomputes)
    stored = this_task(a, forgotten(block_index_x()));
  else
    stored.row = forgotten(task.row), stored.column = forgotten(task.column);
  const Lane storing = this_lane(a, forgotten(thread_index()));
  store_patch<M, kTiles>(a, stored, storing, this_patch(a, storing), sums, x_tile);
}

}  // namespace cuda
}  // namespace mnv2
