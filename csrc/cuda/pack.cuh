// Packs folded fp32 weights into the layouts of layout.h.
#pragma once

#include "tile.cuh"

namespace mnv2 {
namespace cuda {

// The output channel of column `column` of a part's tile `tile`, see store_tiles().
MNV2_DEVICE int output_channel(int tile, int column, int tiles) {
  int base = tile / 4 * 4, count = tiles - base;
  if (count >= 4) {
    count = 4;
  } else if (count == 3) {
    count = tile - base < 2 ? 2 : 1;
    base = count == 2 ? base : tile;
  }
  return base * 8 + column / 2 * 2 * count + (tile - base) * 2 + column % 2;
}

// Of a group of 16 values along the expansion's sum: value i of lane 4 g + t, see TileRows.
template <class M>
MNV2_DEVICE int value_of_group(int t, int i) {
  return M::kBytes == 2 ? i / 2 * 8 + t * 2 + i % 2 : t * 4 + i;
}

// The place of value k of the expansion's sum among (channels, kernel, kernel) weights; -1: it has none.
MNV2_DEVICE int window_weight(const PackArgs& a, int k) {
  const int whole_row = (a.kernel * a.slice + 1) / 2 * 2, whole = (a.kernel * whole_row + 15) / 16 * 16;
  const int first = k / whole * a.slice, rest = k % whole;
  const int channels = a.channels - first < a.slice ? a.channels - first : a.slice;
  const int row = (a.kernel * channels + 1) / 2 * 2, ky = rest / row, i = rest % row;
  if (ky >= a.kernel || i >= a.kernel * channels) return -1;
  return ((first + i % channels) * a.kernel + ky) * a.kernel + i / channels;
}

template <class M>
MNV2_KERNEL(kPackThreads)
pack_kernel(const PackArgs a) {
  using T = typename M::Value;
  constexpr int kLoad = 16 / M::kBytes;  // values in 16 bytes
  const int64_t expand = a.expand ? a.groups * 16 * 32 : 0, expand_bias = a.expand ? 64 : 0;
  const int64_t filters = a.filter_taps > 0 ? (a.filter_taps + 1) * 32 : 0;
  const int64_t project_bias = static_cast<int64_t>(a.parts) * a.tiles * 8;
  int64_t i = static_cast<int64_t>(block_index_x()) * kPackThreads + thread_index();
  if (i < project_bias) {
    reinterpret_cast<float*>(a.packed)[i] = i < a.c_out ? a.project_bias[i] : 0.f;
    return;
  }
  i -= project_bias;
  const int64_t place = i / a.chunk_values, part = place / a.chunks;
  i -= place * a.chunk_values;
  if (part >= a.parts) return;
  unsigned char* const to = a.packed + a.first + place * a.chunk;
  const int first = static_cast<int>(place - part * a.chunks) * 32;  // hidden channel

  if (i < expand) {
    const int lane = static_cast<int>(i / kLoad % 32), value = static_cast<int>(i % kLoad);
    const int load = static_cast<int>(i / (32 * kLoad) % (16 / kLoad)), group = static_cast<int>(i / (16 * 32));
    const int tile = load * (kLoad / 4) + value / 4, column = lane / 4;
    const int k = group * 16 + value_of_group<M>(lane % 4, value % 4);
    const int n = first + column / 2 * 8 + tile * 2 + column % 2;
    const int at = window_weight(a, k);
    const int64_t source = static_cast<int64_t>(n) * a.channels * a.kernel * a.kernel + at;
    store_value(reinterpret_cast<T*>(to) + i, at >= 0 && n < a.c_hidden ? a.expand[source] : 0.f);
    return;
  }
  i -= expand;
  if (i < expand_bias) {
    const int64_t n = first + i / 4 * 2 + i % 2;
    reinterpret_cast<float*>(to + a.expand_bias_at)[i] = n < a.c_hidden ? a.expand_bias[n] : 0.f;
    return;
  }
  i -= expand_bias;
  if (i < filters) {
    const int64_t n = first + i % 32, tap = i / 32;
    float value = 0.f;
    if (n < a.c_hidden) value = tap < a.filter_taps ? a.depthwise[n * a.filter_taps + tap] : a.depthwise_bias[n];
    if constexpr (M::kFilterBytes == 2)
      store_value(reinterpret_cast<T*>(to + a.filters_at) + i, value);
    else
      reinterpret_cast<float*>(to + a.filters_at)[i] = value;
    return;
  }
  i -= filters;
  const int j = static_cast<int>(i);
  int tile, lane, half;
  if constexpr (M::kBytes == 2) {
    tile = j / 256, lane = j % 256 / 8, half = j % 8 / 4;
  } else {
    half = j / (a.tiles * 128), tile = j / 128 % a.tiles, lane = j % 128 / 4;
  }
  const int k = first + lane % 4 * 8 + half * 4 + j % 4;
  const int n = static_cast<int>(part) * a.tiles * 8 + output_channel(tile, lane / 4, a.tiles);
  const bool inside = k < a.c_hidden && n < a.c_out;
  store_value(reinterpret_cast<T*>(to + a.project_at) + i,
              inside ? a.project[static_cast<int64_t>(n) * a.c_hidden + k] : 0.f);
}

}  // namespace cuda
}  // namespace mnv2
