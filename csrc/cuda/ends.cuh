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
    load_windows<M, 4>(s, tile, image, first_row, first_column, height, width, channel, channels, kStemThreads);
    barrier();
    int windows[4];
    MNV2_UNROLL
    for (int i = 0; i < 4; ++i) windows[i] = rows[i] < height ? window_at<M>(s, rows[i], columns[i], channels) : 0;
    multiply_windows<M>(d, tile, windows, tile + s.table, weights, groups, lane);
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

template <class M>
MNV2_KERNEL(kPoolThreads)
pool_kernel(const PoolArgs a) {
  using T = typename M::Value;
  constexpr int kM = kPoolPixels / 16;
  unsigned char* const rows = shared_memory();
  const int thread = thread_index(), lane = thread % 32, warp = thread / 32, g = lane / 4, t = lane % 4;
  const int chunk = block_index_y() * (kPoolThreads / 32) + warp;
  const bool exists = chunk * 32 < a.c_last;
  const unsigned char* const weights = a.packed + static_cast<int64_t>(exists ? chunk : 0) * a.chunk;
  const int row_values = (a.c_last + 31) / 32 * 32, channel = chunk * 32 + t * 8;
  constexpr int kValues = 16 / M::kBytes;
  wait_for_previous_kernel();
  allow_next_kernel();
  for (int i = 0; i < a.images; ++i) {
    const int64_t image = static_cast<int64_t>(block_index_x()) * a.images + i;
    if (image >= a.n) return;
    const T* const x = static_cast<const T*>(a.x) + image * a.pixels * a.c_in;
    float sums[8] = {};
    for (int64_t first = 0; first < a.pixels; first += kPoolPixels) {
      float d[kM][4][4];
      set_bias(d, weights + a.expand_bias, lane);
      for (int group = 0; group < a.groups; group += a.at_once) {
        const int groups = a.groups - group < a.at_once ? a.groups - group : a.at_once, vectors = groups * M::kBytes;
        MNV2_NO_UNROLL
        for (int j = thread; j < kPoolPixels * vectors; j += kPoolThreads) {
          const int row = j / vectors, vector = j - row * vectors;
          const bool inside = first + row < a.pixels;
          copy_vector(rows + row * a.x_pitch + vector * 16, x + (inside ? first + row : 0) * a.c_in,
                      group * 16 + vector * kValues, a.c_in, inside, a.vectors_in);
        }
        copy_async_commit();
        copy_async_wait<0>();
        barrier();
        multiply_chunk<M>(d, rows + g * a.x_pitch + t * 4 * M::kBytes, 8 * a.x_pitch, weights + group * 512 * M::kBytes,
                          groups, lane);
        barrier();
      }
      MNV2_UNROLL
      for (int row = 0; row < 2 * kM; ++row) {
        float values[8];
        clamped_row(d, row, a.lo, a.hi, values);
        if (first + row * 8 + g < a.pixels) {
          MNV2_UNROLL
          for (int j = 0; j < 8; ++j) sums[j] += values[j];
        }
      }
    }
    MNV2_UNROLL
    for (int j = 0; j < 8; ++j) {
      MNV2_UNROLL
      for (int mask = 4; mask < 32; mask *= 2) sums[j] += shuffle_xor(sums[j], mask);
      sums[j] = channel + j < a.c_last ? sums[j] / static_cast<float>(a.pixels) : 0.f;
    }
    if (exists && g == 0) store_values(static_cast<T*>(a.pooled) + image * row_values + channel, sums);
  }
}

template <class M>
MNV2_KERNEL(kClassifyThreads, 1)  // without the 1 the compiler limits itself to 64 registers, and spills
classify_kernel(const ClassifyArgs a) {
  using T = typename M::Value;
  constexpr int kWarps = kClassifyThreads / 32, kValues = kClassifyImages * 32;
  float* const partial = reinterpret_cast<float*>(shared_memory());  // (warps, 16 images, 32 classes)
  const int thread = thread_index(), lane = thread % 32, warp = thread / 32, g = lane / 4, t = lane % 4;
  const int64_t first = static_cast<int64_t>(block_index_x()) * kClassifyImages;
  const int begin = a.groups * warp / kWarps, end = a.groups * (warp + 1) / kWarps;
  const unsigned char* const weights = a.packed + static_cast<int64_t>(block_index_y()) * a.chunk;
  wait_for_previous_kernel();
  allow_next_kernel();
  // Images that do not exist read the first one's row.
  const T* const pooled = static_cast<const T*>(a.pooled) + (begin * 16 + t * 4);
  const T* const upper = pooled + (first + (first + g < a.n ? g : 0)) * a.pooled_row;
  const T* const lower = pooled + (first + (first + g + 8 < a.n ? g + 8 : 0)) * a.pooled_row;
  float d[1][4][4] = {};
  multiply_chunk<M>(d, reinterpret_cast<const unsigned char*>(upper), static_cast<int>(lower - upper) * M::kBytes,
                    weights + begin * 512 * M::kBytes, end - begin, lane);
  MNV2_UNROLL
  for (int i = 0; i < 16; ++i) {
    const int row = i % 4 / 2 * 8 + g, column = t * 8 + i / 4 * 2 + i % 2;
    partial[warp * kValues + row * 32 + column] = d[0][i / 4][i % 4];
  }
  barrier();
  const float* const bias = reinterpret_cast<const float*>(weights + a.expand_bias);
  for (int i = thread; i < kValues; i += kClassifyThreads) {
    const int64_t image = first + i / 32;
    const int output = block_index_y() * 32 + i % 32;
    if (image >= a.n || output >= a.classes) continue;
    float sum = bias[i % 32];
    for (int w = 0; w < kWarps; ++w) sum += partial[w * kValues + i];
    store_value(static_cast<T*>(a.y) + image * a.classes + output, sum);
  }
}

}  // namespace cuda
}  // namespace mnv2
