// A stem's windows. A tile of the image lies in shared memory as (rows, columns, channels), zeros outside the image.
// Operands are read from there: a row of a window is one run of values. Sums run over slices of the channels, see
// window_values(), and a tile has one slice of them.
//
// An operand's register is a pair of neighbouring 16-bit values, which must begin at an even value of the tile. If
// windows begin at odd ones too, the tile has a copy that begins one value later.
#pragma once

#include "tile.cuh"

namespace mnv2 {
namespace cuda {

// Steps of the sum over a slice.
MNV2_DEVICE int slice_groups(const WindowArgs& s, int channels) {
  const int row = (s.kernel * channels + 1) / 2 * 2;
  return (s.kernel * row + 15) / 16;
}

// Bytes from an image's tile to the window that is `row` and `column` windows from the first one.
template <class M>
MNV2_DEVICE int window_at(const WindowArgs& s, int row, int column, int channels) {
  const int value = column * s.stride * channels, at = row * s.stride * s.pitch + value * M::kBytes;
  return M::kBytes == 2 && value % 2 != 0 ? at + s.shifted - M::kBytes : at;
}

// A table of all pairs of values in a window, in the order of the sum: bytes from the window's first value, and the
// bits that count. What lies beside a window must not be multiplied, not even by 0: it may be infinite.
template <class M>
MNV2_DEVICE void find_pairs(const WindowArgs& s, unsigned char* table, int channels, int threads) {
  const int values = s.kernel * channels, row_pairs = (values + 1) / 2, pairs = slice_groups(s, channels) * 8;
  MNV2_NO_UNROLL
  for (int i = thread_index(); i < pairs; i += threads) {
    const int row = i / row_pairs, pair = i - row * row_pairs;
    const bool exists = row < s.kernel;
    const uint32_t at = exists ? row * s.pitch + pair * 2 * M::kBytes : 0;
    const uint32_t mask = !exists ? 0 : 2 * pair + 1 < values ? 0xffffffffu : 0x0000ffffu;
    // Those of a lane are neighbours, see TileRows.
    const int place = M::kBytes == 2 ? i / 8 * 8 + i % 4 * 2 + i / 4 % 2 : i;
    reinterpret_cast<Two*>(table)[place] = {at, mask};
  }
}

// Four neighbouring values of a tile's row.
template <class T>
struct alignas(4 * sizeof(T)) TileValues {
  T v[4];
};

// Where a thread's four values of each row come from: from value `value` of the tile's row on, which begins at column
// `left` of the image. They may lie beyond the tile, where they do not count. Offset: int32_t if s.near.
template <class Offset>
struct TileSource {
  Offset from[4];  // elements from the image's row
  bool inside[4];  // whether they lie in the image

  // by_channels: divides by `channels`.
  MNV2_DEVICE TileSource(const WindowArgs& s, int value, int left, int channel, int channels, Divisor by_channels) {
    int column = by_channels.quotient(value), c = value - column * channels;
    column += left;
    const Offset stride_w = static_cast<Offset>(s.stride_w), stride_c = static_cast<Offset>(s.stride_c);
    MNV2_UNROLL
    for (int i = 0; i < 4; ++i) {
      inside[i] = static_cast<unsigned>(column) < static_cast<unsigned>(s.w);
      from[i] = inside[i] ? column * stride_w + (channel + c) * stride_c : 0;
      if (++c == channels) c = 0, ++column;
    }
  }
  MNV2_DEVICE bool whole() const { return inside[0] && inside[1] && inside[2] && inside[3]; }
};

// Rows x columns pixels of a tile from row `top` and column `left` of the image on, which may lie outside. All values
// of kRows rows are read before the first is stored, so that no read waits for another.
template <class M, int kRows, class Offset>
MNV2_DEVICE void load_tile(const WindowArgs& s, unsigned char* tile, int64_t image, int top, int left, int rows,
                           int columns, int channel, int channels, Divisor by_channels, int threads) {
  using T = typename M::Value;
  const int first_row = thread_index() >> s.lanes, step = threads >> s.lanes;
  const int64_t step_from = step * s.stride_h;
  const T* const x = static_cast<const T*>(s.x) + image * s.stride_n + (top + first_row) * s.stride_h;
  unsigned char* to_row = tile + first_row * s.pitch;
  for (int copy = 0;; ++copy, to_row += s.shifted) {
    MNV2_NO_UNROLL
    for (int value = (thread_index() & ((1 << s.lanes) - 1)) * 4; value < columns * channels; value += 4 << s.lanes) {
      const TileSource<Offset> source(s, value + copy, left, channel, channels, by_channels);
      const bool whole = source.whole();
      const T* line = x;
      unsigned char* to = to_row + value * M::kBytes;
      MNV2_NO_UNROLL
      for (int row = first_row; row < rows; row += kRows * step) {
        TileValues<T> read[kRows];
        MNV2_UNROLL
        for (int r = 0; r < kRows; ++r, line = forgotten(line + step_from)) {
          const bool in_image = static_cast<unsigned>(top + row + r * step) < static_cast<unsigned>(s.h);
          if (in_image && whole) {
            MNV2_UNROLL
            for (int i = 0; i < 4; ++i) read[r].v[i] = line[forgotten(source.from[i])];
          } else {
            MNV2_UNROLL
            for (int i = 0; i < 4; ++i) {
              if (in_image && source.inside[i])
                read[r].v[i] = line[forgotten(source.from[i])];
              else
                read[r].v[i] = T{};
            }
          }
        }
        MNV2_UNROLL
        for (int r = 0; r < kRows; ++r, to += step * s.pitch)
          if (row + r * step < rows) *reinterpret_cast<TileValues<T>*>(to) = read[r];
      }
    }
    if (copy == 1 || s.shifted == 0) return;
  }
}

// The tile of rows x columns windows from the window in `row` and `column` of the convolution's output on.
template <class M, int kRows>
MNV2_DEVICE void load_windows(const WindowArgs& s, unsigned char* tile, int64_t image, int row, int column, int rows,
                              int columns, int channel, int channels, Divisor by_channels, int threads) {
  const int top = row * s.stride - s.pad_top, left = column * s.stride - s.pad_left;
  const int height = (rows - 1) * s.stride + s.kernel, width = (columns - 1) * s.stride + s.kernel;
  if (s.near) {
    load_tile<M, kRows, int32_t>(s, tile, image, top, left, height, width, channel, channels, by_channels, threads);
  } else {
    load_tile<M, kRows, int64_t>(s, tile, image, top, left, height, width, channel, channels, by_channels, threads);
  }
}

// The operand at a window's pairs, two entries of the table.
template <class M>
MNV2_DEVICE void load_pairs(const unsigned char* window, const Four& pairs, Operand<M>& to) {
  if constexpr (M::kOperand == 2) {
    to.r[0] = *reinterpret_cast<const uint32_t*>(window + pairs.x) & pairs.y;
    to.r[1] = *reinterpret_cast<const uint32_t*>(window + pairs.z) & pairs.w;
  } else {
    const uint32_t at[4] = {pairs.x, pairs.x + 4, pairs.z, pairs.z + 4};
    const uint32_t counts[4] = {pairs.y & 0xffff, pairs.y >> 16, pairs.w & 0xffff, pairs.w >> 16};
    MNV2_UNROLL
    for (int i = 0; i < 4; ++i) to.r[i] = counts[i] ? *reinterpret_cast<const uint32_t*>(window + at[i]) : 0;
  }
}

// As TileRows, of rows that are windows. windows: bytes from `tiles` to this lane's rows g, g + 8, ...
template <class M, int kM>
struct WindowRows {
  const unsigned char *rows[2 * kM], *pairs;

  MNV2_DEVICE WindowRows(const unsigned char* tiles, const int32_t (&windows)[2 * kM], const unsigned char* table,
                         int lane)
      : pairs(table + (lane & 3) * 16) {
    MNV2_UNROLL
    for (int i = 0; i < 2 * kM; ++i) rows[i] = tiles + windows[i];
  }
  MNV2_DEVICE void load(int m, Rows<M>& to) const {
    const Four at = *reinterpret_cast<const Four*>(pairs);
    Operand<M> upper, lower;
    load_pairs<M>(rows[2 * m], at, upper);
    load_pairs<M>(rows[2 * m + 1], at, lower);
    to.set(upper, lower);
  }
  MNV2_DEVICE void next_group() { pairs += 64; }
};

}  // namespace cuda
}  // namespace mnv2
