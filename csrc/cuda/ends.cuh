// The network's ends: the stem by itself, and the head in two kernels.
#pragma once

#include "window.cuh"

namespace mnv2 {
namespace cuda {

// A lane's eight neighbouring channels of one of its rows, clamped.
template <int kM>
MNV2_DEVICE void clamped_row(const float (&d)[kM][4][4], int row, float lo, float hi, float (&values)[8]) {
  MNV2_UNROLL
  for (int i = 0; i < 8; ++i) values[i] = clamp(d[row / 2][i / 2][row % 2 * 2 + i % 2], lo, hi);
}

template <class M>
MNV2_KERNEL(kStemThreads)
stem_kernel(const StemArgs a) {
  using T = typename M::Value;
  const WindowArgs& s = a.window;
  unsigned char* const tile = shared_memory();
  const int thread = thread_index(), lane = thread % 32, warp = thread / 32, g = lane / 4, t = lane % 4;
  const int tiles = a.tiles_y * a.tiles_x, index = block_index_x() % tiles;
  const int64_t image = block_index_x() / tiles;
  const int first_row = index / a.tiles_x * a.tile_h, first_column = index % a.tiles_x * a.tile_w;
  const int height = a.h_out - first_row < a.tile_h ? a.h_out - first_row : a.tile_h;
  const int width = a.w_out - first_column < a.tile_w ? a.w_out - first_column : a.tile_w;
  int rows[4], columns[4];  // of this lane's pixels in the tile
  MNV2_UNROLL
  for (int i = 0; i < 4; ++i) {
    const int pixel = warp * 32 + i * 8 + g;
    rows[i] = pixel / width, columns[i] = pixel - rows[i] * width;
  }
  wait_for_previous_kernel();
  allow_next_kernel();
  const unsigned char* weights = a.packed + static_cast<int64_t>(block_index_y()) * a.chunk;
  float d[2][4][4];
  if (a.image_bias == nullptr) {
    set_bias(d, weights + a.expand_bias, lane);
  } else {
    set_image_bias(d, a.image_bias + image * a.c_out, block_index_y() * 32, a.c_out, lane);
  }
  for (int channel = 0; channel < s.c; channel += s.slice) {
    const int channels = s.c - channel < s.slice ? s.c - channel : s.slice, groups = slice_groups(s, channels);
    if (channel > 0) barrier();  // before the tile is written over
    if (channel == 0 || channels < s.slice) find_pairs<M>(s, tile + s.table, channels, kStemThreads);
    load_windows<M, 4>(s, tile, image, first_row, first_column, height, width, channel, channels, Divisor::of(channels),
                       kStemThreads);
    barrier();
    int windows[4];
    MNV2_UNROLL
    for (int i = 0; i < 4; ++i) windows[i] = rows[i] < height ? window_at<M>(s, rows[i], columns[i], channels) : 0;
    multiply_chunk<M>(d, WindowRows<M, 2>(tile, windows, tile + s.table, lane), weights, groups, lane);
    weights += groups * 512 * M::kBytes;
  }
  const int channel = block_index_y() * 32 + t * 8;
  MNV2_UNROLL
  for (int i = 0; i < 4; ++i) {
    if (rows[i] >= height) continue;
    float values[8];
    clamped_row(d, i, a.lo, a.hi, values);
    const int64_t pixel = (image * a.h_out + first_row + rows[i]) * a.w_out + first_column + columns[i];
    T* const y = static_cast<T*>(a.y) + pixel * a.c_out + channel;
    if (a.vectors_out) {
      if (channel < a.c_out) store_values(y, values);
    } else {
      MNV2_UNROLL
      for (int j = 0; j < 8; ++j)
        if (channel + j < a.c_out) store_value(y + j, values[j]);
    }
  }
}

template <class M, bool kTogether>
MNV2_KERNEL(kPoolThreads)
pool_kernel(const PoolArgs a) {
  using T = typename M::Value;
  constexpr int kWarps = kPoolThreads / 32, kM = kPoolPixels / 16 / (kTogether ? kWarps : 1);
  unsigned char* const rows = shared_memory();
  const int thread = thread_index(), lane = thread % 32, warp = thread / 32, g = lane / 4, t = lane % 4;
  const int chunk = kTogether ? block_index_y() : block_index_y() * kWarps + warp;
  const int warp_row = kTogether ? warp * kM * 16 : 0;
  const bool exists = chunk * 32 < a.c_last;
  const unsigned char* const packed = a.packed + static_cast<int64_t>(exists ? chunk : 0) * a.chunk;
  unsigned char* const copied = rows + kPoolPixels * a.x_pitch;
  const unsigned char* const weights = kTogether ? copied : packed;
  const int row_values = (a.c_last + 31) / 32 * 32, channel = chunk * 32 + t * 8;
  constexpr int kValues = 16 / M::kBytes;
  if constexpr (kTogether) {
    MNV2_NO_UNROLL
    for (int i = thread * 16; i < a.chunk; i += kPoolThreads * 16) copy_async(copied + i, packed + i, true);
  }
  wait_for_previous_kernel();
  allow_next_kernel();
  for (int i = 0; i < a.images; ++i) {
    const int64_t image = static_cast<int64_t>(block_index_x()) * a.images + i;
    if (image >= a.n) return;
    const T* const x = static_cast<const T*>(a.x) + image * a.pixels * a.c_in;
    float sums[8] = {};
    for (int64_t first = 0; first < a.pixels; first += kPoolPixels) {
      float d[kM][4][4];
      set_bias(d, packed + a.expand_bias, lane);
      for (int group = 0; group < a.groups; group += a.at_once) {
        const int groups = a.groups - group < a.at_once ? a.groups - group : a.at_once, vectors = groups * M::kBytes;
        const Divisor by_vectors = Divisor::of(vectors);
        MNV2_NO_UNROLL
        for (int j = thread; j < kPoolPixels * vectors; j += kPoolThreads) {
          const int row = by_vectors.quotient(j), vector = j - row * vectors;
          const bool inside = first + row < a.pixels;
          copy_vector(rows + row * a.x_pitch + vector * 16, x + (inside ? first + row : 0) * a.c_in,
                      group * 16 + vector * kValues, a.c_in, inside, a.vectors_in);
        }
        copy_async_commit();
        copy_async_wait<0>();
        barrier();
        const TileRows<M> from(rows + warp_row * a.x_pitch, a.x_pitch, lane);
        const unsigned char* const step = weights + group * 512 * M::kBytes;
        if constexpr (kTogether)
          multiply_chunk<M>(d, from, step, groups, lane);
        else
          multiply_far<M>(d, from, step, groups, lane);
        barrier();
      }
      MNV2_UNROLL
      for (int row = 0; row < 2 * kM; ++row) {
        float values[8];
        clamped_row(d, row, a.lo, a.hi, values);
        if (first + warp_row + row * 8 + g < a.pixels) {
          MNV2_UNROLL
          for (int j = 0; j < 8; ++j) sums[j] += values[j];
        }
      }
    }
    MNV2_UNROLL
    for (int j = 0; j < 8; ++j) {
      MNV2_UNROLL
      for (int mask = 4; mask < 32; mask *= 2) sums[j] += shuffle_xor(sums[j], mask);
    }
    if constexpr (kTogether) {  // the sums of all warps, where the rows were
      float* const partial = reinterpret_cast<float*>(rows) + t * 8;
      MNV2_UNROLL
      for (int j = 0; j < 8; ++j) {
        if (g == 0) partial[warp * 32 + j] = sums[j];
      }
      barrier();
      MNV2_UNROLL
      for (int j = 0; j < 8; ++j) {
        sums[j] = partial[j];
        MNV2_UNROLL
        for (int w = 1; w < kWarps; ++w) sums[j] += partial[w * 32 + j];
      }
      barrier();  // before the next image's rows
    }
    MNV2_UNROLL
    for (int j = 0; j < 8; ++j) sums[j] = channel + j < a.c_last ? sums[j] / static_cast<float>(a.pixels) : 0.f;
    if (exists && g == 0 && (!kTogether || warp == 0))
      store_values(static_cast<T*>(a.pooled) + image * row_values + channel, sums);
  }
}

// Every lane copies the operands that it reads itself.
template <class M>
MNV2_DEVICE void copy_operands(unsigned char* to, const unsigned char* weights, int groups, int lane) {
  MNV2_NO_UNROLL
  for (int i = 0; i < groups * M::kBytes; ++i)
    copy_async(to + i * 512 + lane * 16, weights + i * 512 + lane * 16, true);
}

template <class M>
MNV2_KERNEL(kClassifyThreads, 1)  // without the 1 the compiler limits itself to 64 registers, and spills
classify_kernel(const ClassifyArgs a) {
  using T = typename M::Value;
  constexpr int kWarps = kClassifyWarps, kValues = kClassifyImages * 32;
  unsigned char* const shared = shared_memory();
  const int thread = thread_index(), lane = thread % 32, warp = thread / 32, g = lane / 4, t = lane % 4;
  const int64_t first = static_cast<int64_t>(block_index_x()) * kClassifyImages;
  const int begin = a.groups * warp / kWarps, end = a.groups * (warp + 1) / kWarps;
  const unsigned char* const weights = a.packed + static_cast<int64_t>(block_index_y()) * a.chunk;
  unsigned char* const operands = shared + warp * a.warp;
  unsigned char* const rows = operands + a.at_once * 512 * M::kBytes;
  float d[1][4][4] = {};
  for (int group = begin; group == begin || group < end; group += a.at_once) {
    const int groups = end - group < a.at_once ? end - group : a.at_once, vectors = groups * M::kBytes;
    copy_operands<M>(operands, weights + group * 512 * M::kBytes, groups, lane);
    if (group == begin) {
      wait_for_previous_kernel();
      allow_next_kernel();
    }
    MNV2_NO_UNROLL
    for (int i = lane; i < kClassifyImages * vectors; i += 32) {
      const int row = i / vectors, vector = i - row * vectors;
      const bool valid = first + row < a.n;
      const T* const pooled = static_cast<const T*>(a.pooled) + (first + (valid ? row : 0)) * a.pooled_row;
      copy_async(rows + row * a.x_pitch + vector * 16, pooled + group * 16 + vector * (16 / M::kBytes), valid);
    }
    copy_async_commit();
    copy_async_wait<0>();
    warp_barrier();
    multiply_chunk<M>(d, TileRows<M>(rows, a.x_pitch, lane), operands, groups, lane);
    warp_barrier();  // before they are written over
  }
  float* const partial = reinterpret_cast<float*>(operands);  // (16 images, 32 classes)
  MNV2_UNROLL
  for (int i = 0; i < 16; ++i) {
    const int row = i % 4 / 2 * 8 + g, column = t * 8 + i / 4 * 2 + i % 2;
    partial[row * 32 + column] = d[0][i / 4][i % 4];
  }
  barrier();
  const float* const bias = reinterpret_cast<const float*>(weights + a.expand_bias);
  for (int i = thread; i < kValues; i += kClassifyThreads) {
    const int64_t image = first + i / 32;
    const int output = block_index_y() * 32 + i % 32;
    if (image >= a.n || output >= a.classes) continue;
    float sum = bias[i % 32 / 2 * 4 + i % 2];
    for (int w = 0; w < kWarps; ++w) sum += reinterpret_cast<const float*>(shared + w * a.warp)[i];
    store_value(static_cast<T*>(a.y) + image * a.classes + output, sum);
  }
}

}  // namespace cuda
}  // namespace mnv2
