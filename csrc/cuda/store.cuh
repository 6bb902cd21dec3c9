// The end of a tile: sums of all splits of the hidden channels, biases, clamp and residual, and what is stored.
#pragma once

#include "task.cuh"

namespace mnv2 {
namespace cuda {

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

// Tiles that lie side by side in a lane's registers: four, or of the last ones two or one.
MNV2_DEVICE constexpr int tiles_from(int tile, int tiles) { return tiles - tile >= 4 ? 4 : tiles - tile >= 2 ? 2 : 1; }

// The number of the group that begins with a tile. group_of(tiles, tiles): how many there are.
MNV2_DEVICE constexpr int group_of(int tile, int tiles) {
  int group = 0;
  for (int first = 0; first < tile; first += tiles_from(first, tiles)) ++group;
  return group;
}

// Where a thread block's sums lie for its cluster. Nothing else lies there any more.
MNV2_DEVICE float* cluster_sums(const BlockArgs& a) { return reinterpret_cast<float*>(shared_memory() + a.weights_at); }

template <int kValues>
MNV2_DEVICE void share_sums(const BlockArgs& a, const float* sums) {
  float* const own = cluster_sums(a);
  MNV2_UNROLL
  for (int i = 0; i < kValues; i += 4)
    *reinterpret_cast<Four*>(own + thread_index() * 4 + i * a.threads) = {
        float_to_bits(sums[i]), float_to_bits(sums[i + 1]), float_to_bits(sums[i + 2]), float_to_bits(sums[i + 3])};
}

// The sums of all splits of a cluster in their order, of kCount neighbouring tiles of a row of a warp. from: the first
// of them that a thread has shared, in its own block's memory.
template <int kCount>
MNV2_DEVICE void add_up_cluster(const BlockArgs& a, const float* from, float (&sums)[kCount][4]) {
  constexpr int kAtOnce = 2;  // splits
  MNV2_UNROLL
  for (int i = 0; i < 4 * kCount; ++i) sums[i / 4][i % 4] = 0.f;
  MNV2_NO_UNROLL
  for (int first = 0; first < a.splits; first += kAtOnce) {
    float values[kAtOnce][kCount][4];  // all are on their way before the first is added
    MNV2_UNROLL
    for (int i = 0; i < kAtOnce * kCount; ++i) {
      const int split = first + i / kCount;
      if (split < a.splits) load_from_block(from + i % kCount * 4 * a.threads, split, values[i / kCount][i % kCount]);
    }
    MNV2_UNROLL
    for (int i = 0; i < kAtOnce * kCount * 4; ++i)
      if (first + i / 4 / kCount < a.splits)
        sums[i / 4 % kCount][i % 4] += values[i / 4 / kCount][i / 4 % kCount][i % 4];
  }
}

// Where a lane's patch goes to.
struct Outputs {
  int pixel;        // the first one, in the image
  int in_tile;      // the same pixel of the input, if it is the residual: in x_tile
  uint32_t exists;  // pixel by pixel: whether it lies in the tile and in the image
};

template <class B>
MNV2_DEVICE Outputs outputs_of(const BlockArgs& a, const Task& task, const TileInput& in, const Patch& p) {
  const int tile_row = p.row * B::kPatchHeight, tile_column = p.column * B::kPatchWidth;
  const int row = task.row + tile_row, column = task.column + tile_column;
  const int rows = a.tile_h - tile_row < a.h_out - row ? a.tile_h - tile_row : a.h_out - row;
  const int columns = a.tile_w - tile_column < a.w_out - column ? a.tile_w - tile_column : a.w_out - column;
  Outputs outputs{row * a.w_out + column, 0, 0};
  outputs.in_tile = (p.image * in.height + row - in.row) * in.width + column - in.column;
  MNV2_UNROLL
  for (int i = 0; i < B::kPatch; ++i)
    if (p.in_tile && i / B::kPatchWidth < rows && i % B::kPatchWidth < columns) outputs.exists |= 1u << i;
  return outputs;
}

// A pixel's residual, of kCount neighbouring channels. An expansion's input has whole groups of 16 channels in shared
// memory, so that it is read in vectors.
template <class T, int kCount>
MNV2_DEVICE void add_from_tile(const T* pixel, int channel, float (&values)[kCount]) {
  float residual[kCount];
  load_values(pixel + channel, residual);
  MNV2_UNROLL
  for (int i = 0; i < kCount; ++i) values[i] += residual[i];
}
template <class T, int kCount>
MNV2_DEVICE void add_from_memory(const T* pixel, int channel, int channels, float (&values)[kCount]) {
  MNV2_UNROLL
  for (int i = 0; i < kCount; ++i)
    if (channel + i < channels) values[i] += to_float(load_shared_result(pixel + channel + i));
}

// Where a lane's sums go to.
template <class T>
struct Target {
  T* y;  // the patch's first pixel, of the thread block's first output channel
  int image, first_channel, t;
  int width;  // of the tile's input
};

// kCount tiles from kFirst on of kRows rows of a lane's output pixels: sums, biases and residual to memory, as 2 kCount
// neighbouring channels. sums(row, tile): four of them. kPlain: no clamp, whole vectors, and any residual in x_tile.
template <int kRows, bool kPlain, int kFirst, int kCount, class T, class Sums>
MNV2_DEVICE void store_group(const BlockArgs& a, const Sums& sums, const Target<T>& target, const Outputs& outputs,
                             const unsigned char* x_tile) {
  const int channel = kFirst * 8 + target.t * 2 * kCount, channels = a.c_out - target.first_channel;
  if (channel >= channels) return;
  float bias[2 * kCount];
  load_constants(a.bias + target.first_channel + channel, bias);
  MNV2_UNROLL
  for (int pixel = 0; pixel < 2 * kRows; ++pixel) {
    if ((outputs.exists >> pixel & 1) == 0) continue;
    const int row = pixel / 2, column = pixel % 2;
    T* const to = target.y + channel + static_cast<int64_t>(row * a.w_out + column) * a.c_out;
    float values[2 * kCount];
    MNV2_UNROLL
    for (int i = 0; i < 2 * kCount; ++i) values[i] = sums(row, i / 2)[column * 2 + i % 2] + bias[i];
    if (!kPlain && a.clamps_out) {
      MNV2_UNROLL
      for (int i = 0; i < 2 * kCount; ++i) values[i] = clamp(values[i], a.out_lo, a.out_hi);
    }
    if (a.residual && (kPlain || a.has_expand)) {
      const unsigned char* const pixel_in = x_tile + (outputs.in_tile + row * target.width + column) * a.x_pitch;
      add_from_tile(reinterpret_cast<const T*>(pixel_in), target.first_channel + channel, values);
    } else if (a.residual) {  // apart, since one pointer to either would be generic, and reads through it slow
      const int64_t pixel_in = outputs.pixel + row * a.w + column;
      add_from_memory(static_cast<const T*>(a.x) + target.image * a.x_image + pixel_in * a.c_in,
                      target.first_channel + channel, a.c_in, values);
    }
    if (kPlain || a.vectors_out) {
      store_values(to, values);
    } else {
      MNV2_UNROLL
      for (int i = 0; i < 2 * kCount; ++i)
        if (channel + i < channels) store_value(to + i, values[i]);
    }
  }
}

// Tiles [kFirst, kTiles), group by group.
template <class B, bool kPlain, int kTiles, int kFirst, class T>
MNV2_DEVICE void store_tiles(const BlockArgs& a, const float (&sums)[B::kRows][kTiles][4], const Target<T>& target,
                             const Outputs& outputs, const unsigned char* x_tile) {
  if constexpr (kFirst < kTiles) {
    constexpr int kCount = tiles_from(kFirst, kTiles);
    const auto of_group = [&](int row, int tile) -> const float (&)[4] { return sums[row][kFirst + tile]; };
    store_group<B::kRows, kPlain, kFirst, kCount>(a, of_group, target, outputs, x_tile);
    store_tiles<B, kPlain, kTiles, kFirst + kCount>(a, sums, target, outputs, x_tile);
  }
}

template <class M, int kTiles>
MNV2_DEVICE Target<typename M::Value> target_of(const BlockArgs& a, const Task& task, const TileInput& in, int image,
                                                int t, const Outputs& outputs) {
  using T = typename M::Value;
  const int first_channel = task.part * kTiles * 8;
  T* const y = static_cast<T*>(a.y) + image * a.y_image + static_cast<int64_t>(outputs.pixel) * a.c_out + first_channel;
  return {y, image, first_channel, t, in.width};
}

MNV2_DEVICE bool stores_plainly(const BlockArgs& a) {
  return a.vectors_out && !a.clamps_out && (a.has_expand || !a.residual);
}

// A lane's patch of an image.
template <class M, int kTiles>
MNV2_DEVICE void store_patch(const BlockArgs& a, const Task& task, const TileInput& in, int image, int t,
                             const Outputs& outputs, const float (&sums)[Block<M, kTiles>::kRows][kTiles][4],
                             const unsigned char* x_tile) {
  using B = Block<M, kTiles>;
  if (image >= a.n) return;
  const auto target = target_of<M, kTiles>(a, task, in, image, t, outputs);
  if (stores_plainly(a))
    store_tiles<B, true, kTiles, 0>(a, sums, target, outputs, x_tile);
  else
    store_tiles<B, false, kTiles, 0>(a, sums, target, outputs, x_tile);
}

// Adds up and stores a group of tiles, of one of a warp's rows. from: what a thread has shared of the row.
template <int kTiles, int kFirst, class T>
MNV2_DEVICE void store_sums_of_cluster(const BlockArgs& a, int group, const float* from, const Target<T>& target,
                                       const Outputs& outputs, const unsigned char* x_tile) {
  if constexpr (kFirst < kTiles) {
    constexpr int kCount = tiles_from(kFirst, kTiles);
    if (group == group_of(kFirst, kTiles)) {
      float sums[kCount][4];
      add_up_cluster(a, from + kFirst * 4 * a.threads, sums);
      const auto of_group = [&](int, int tile) -> const float (&)[4] { return sums[tile]; };
      if (stores_plainly(a))
        store_group<1, true, kFirst, kCount>(a, of_group, target, outputs, x_tile);
      else
        store_group<1, false, kFirst, kCount>(a, of_group, target, outputs, x_tile);
    } else {
      store_sums_of_cluster<kTiles, kFirst + kCount>(a, group, from, target, outputs, x_tile);
    }
  }
}

// The thread blocks of a cluster share out the groups of tiles of all their warps' rows.
template <class M, int kTiles>
MNV2_APART void store_cluster(const BlockArgs& a) {
  using B = Block<M, kTiles>;
  const Task task = this_task(a, block_index_x());
  const TileInput in = tile_input<B>(a, task);
  Lane lane = this_lane(a, thread_index());
  const unsigned char* const x_tile = shared_memory() + a.x_at;
  const int rows = B::kRows * lane.warps, units = group_of(kTiles, kTiles) * rows;
  MNV2_NO_UNROLL
  for (int unit = task.split * lane.warps + lane.warp; unit < units; unit += a.splits * lane.warps) {
    const int group = unit / rows, warp_row = unit - group * rows, row = warp_row % B::kRows;
    lane.warp = warp_row / B::kRows;
    const Patch patch = this_patch(a, lane);
    const int image = task.first_image + patch.image;
    if (image >= a.n) continue;
    Outputs outputs = outputs_of<B>(a, task, in, patch);
    outputs.pixel += row * a.w_out, outputs.in_tile += row * in.width;
    outputs.exists = outputs.exists >> row * B::kPatchWidth & 3;
    const auto target = target_of<M, kTiles>(a, task, in, image, lane.t, outputs);
    const float* const from = cluster_sums(a) + (lane.warp * 32 + lane.lane) * 4 + row * kTiles * 4 * a.threads;
    store_sums_of_cluster<kTiles, 0>(a, group, from, target, outputs, x_tile);
  }
}

}  // namespace cuda
}  // namespace mnv2
