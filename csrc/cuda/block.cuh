// The inverted-residual block: one thread block computes a tile of output pixels, 32 hidden channels at a time. Of
// these the tile and its halo are expanded into shared memory, filtered from there into registers, and multiplied by
// their part of the projection, whose sums stay in registers throughout.
#pragma once

#include "tile.cuh"

namespace mnv2 {
namespace cuda {

// What is fixed in a variant of the kernel. kTiles: tiles of 8 output channels. A warp holds kRows times 16 output
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

// Depthwise filters: any kernel, stride and dilation, or 3x3 without dilation.
enum : int { kAnyFilter = 0, kStride1 = 1, kStride2 = 2 };

// Where the eight hidden channels 8 t to 8 t + 7 of a pixel lie: 16 bytes each `kVector` apart, so that a warp's
// accesses of 16 bytes meet no bank twice.
template <class M>
struct Expanded {
  static constexpr int kPixel = 32 * M::kBytes;
  static constexpr int kVectors = M::kBytes / 2;
  static constexpr int kVector = 64;
};

// An output pixel's eight filtered channels as two operands of the projection.
template <class M>
struct Filtered {
  Operand<M> half[2];
};

// The filter's sums: fp16 in pairs, everything else in fp32.
template <class M>
struct FilterSums {
  float v[8];

  MNV2_DEVICE void set(const unsigned char* bias) {
    MNV2_UNROLL
    for (int i = 0; i < 8; ++i) v[i] = reinterpret_cast<const float*>(bias)[i];
  }
};
template <>
struct FilterSums<HalfMath> {
  uint32_t v[4];

  MNV2_DEVICE void set(const unsigned char* bias) {
    const Four b = *reinterpret_cast<const Four*>(bias);
    v[0] = b.x, v[1] = b.y, v[2] = b.z, v[3] = b.w;
  }
};

// A filter's tap or a pixel, for eight channels, in the form in which it is multiplied.
template <class M>
using Eight = FilterSums<M>;

MNV2_DEVICE void load_tap(const unsigned char* from, FilterSums<HalfMath>& to) { to.set(from); }
template <class M>
MNV2_DEVICE void load_tap(const unsigned char* from, FilterSums<M>& to) {
  to.set(from);
}

MNV2_DEVICE void load_pixel(const unsigned char* from, Eight<HalfMath>& to) { to.set(from); }
MNV2_DEVICE void load_pixel(const unsigned char* from, Eight<BFloat16Math>& to) {
  const Four p = *reinterpret_cast<const Four*>(from);
  const uint32_t words[4] = {p.x, p.y, p.z, p.w};
  MNV2_UNROLL
  for (int i = 0; i < 4; ++i)
    to.v[2 * i] = unpack_first<BFloat16>(words[i]), to.v[2 * i + 1] = unpack_second<BFloat16>(words[i]);
}
template <bool kExact>
MNV2_DEVICE void load_pixel(const unsigned char* from, Eight<FloatMath<kExact>>& to) {
  MNV2_UNROLL
  for (int i = 0; i < 2; ++i) {
    const Four p = *reinterpret_cast<const Four*>(from + i * Expanded<FloatMath<kExact>>::kVector);
    to.v[4 * i] = bits_to_float(p.x), to.v[4 * i + 1] = bits_to_float(p.y);
    to.v[4 * i + 2] = bits_to_float(p.z), to.v[4 * i + 3] = bits_to_float(p.w);
  }
}

MNV2_DEVICE void add_product(FilterSums<HalfMath>& sums, const Eight<HalfMath>& pixel, const Eight<HalfMath>& tap) {
  MNV2_UNROLL
  for (int i = 0; i < 4; ++i) sums.v[i] = fma_half2(pixel.v[i], tap.v[i], sums.v[i]);
}
template <class M>
MNV2_DEVICE void add_product(FilterSums<M>& sums, const Eight<M>& pixel, const Eight<M>& tap) {
  MNV2_UNROLL
  for (int i = 0; i < 8; ++i) sums.v[i] = fma(pixel.v[i], tap.v[i], sums.v[i]);
}

MNV2_DEVICE void clamp_filtered(const FilterSums<HalfMath>& sums, float lo, float hi, Filtered<HalfMath>& to) {
  const uint32_t least = pack<Half>(lo, lo), most = pack<Half>(hi, hi);
  MNV2_UNROLL
  for (int i = 0; i < 4; ++i) to.half[i / 2].r[i % 2] = clamp_half2(sums.v[i], least, most);
}
MNV2_DEVICE void clamp_filtered(const FilterSums<BFloat16Math>& sums, float lo, float hi, Filtered<BFloat16Math>& to) {
  MNV2_UNROLL
  for (int i = 0; i < 4; ++i)
    to.half[i / 2].r[i % 2] = pack<BFloat16>(clamp(sums.v[2 * i], lo, hi), clamp(sums.v[2 * i + 1], lo, hi));
}
template <bool kExact>
MNV2_DEVICE void clamp_filtered(const FilterSums<FloatMath<kExact>>& sums, float lo, float hi,
                                Filtered<FloatMath<kExact>>& to) {
  MNV2_UNROLL
  for (int i = 0; i < 8; ++i) to.half[i / 4].r[i % 4] = float_to_bits(clamp(sums.v[i], lo, hi));
}

// The depthwise filter over a lane's patch. window: the lane's channels of the patch's first input pixel; filters and
// bias: the lane's channels of the first tap.
template <class M, int kHeight, int kWidth, int kFilter>
MNV2_DEVICE void filter_patch(const BlockArgs& a, const unsigned char* window, const unsigned char* filters,
                              const unsigned char* bias, Filtered<M> (&out)[kHeight * kWidth]) {
  constexpr int kPixel = Expanded<M>::kPixel, kTap = 32 * M::kFilterBytes;
  FilterSums<M> sums[kHeight * kWidth];
  sums[0].set(bias);
  MNV2_UNROLL
  for (int i = 1; i < kHeight * kWidth; ++i) sums[i] = sums[0];
  if constexpr (kFilter == kAnyFilter) {
    for (int tap = 0; tap < a.kernel * a.kernel; ++tap) {
      Eight<M> weight;
      load_tap(filters + tap * kTap, weight);
      const unsigned char* from =
          window + tap / a.kernel * a.dilation * a.e_pitch + tap % a.kernel * a.dilation * kPixel;
      MNV2_UNROLL
      for (int y = 0; y < kHeight; ++y) {
        MNV2_UNROLL
        for (int x = 0; x < kWidth; ++x) {
          Eight<M> pixel;
          load_pixel(from + y * a.stride * a.e_pitch + x * a.stride * kPixel, pixel);
          add_product(sums[y * kWidth + x], pixel, weight);
        }
      }
    }
  } else {
    // A row of taps at a time, or registers run out. At stride 1 the lower of two rows is the upper one for the next
    // taps.
    constexpr int kStride = kFilter, kColumns = (kWidth - 1) * kStride + 3;
    constexpr bool kKept = kHeight == 2 && kStride == 1;
    Eight<M> kept[kColumns]{};
    if constexpr (kKept) {
      MNV2_UNROLL
      for (int column = 0; column < kColumns; ++column) load_pixel(window + column * kPixel, kept[column]);
    }
    MNV2_NO_UNROLL
    for (int ky = 0; ky < 3; ++ky) {
      Eight<M> taps[3];
      MNV2_UNROLL
      for (int i = 0; i < 3; ++i) load_tap(filters + (ky * 3 + i) * kTap, taps[i]);
      MNV2_UNROLL
      for (int y = 0; y < kHeight; ++y) {
        MNV2_UNROLL
        for (int column = 0; column < kColumns; ++column) {
          Eight<M> pixel = kept[column];
          if (!kKept || y == 1) load_pixel(window + (y * kStride + ky) * a.e_pitch + column * kPixel, pixel);
          MNV2_UNROLL
          for (int x = 0; x < kWidth; ++x) {
            const int kx = column - x * kStride;
            if (kx >= 0 && kx < 3) add_product(sums[y * kWidth + x], pixel, taps[kx]);
          }
          if (kKept && y == 1) kept[column] = pixel;
        }
      }
    }
  }
  MNV2_UNROLL
  for (int i = 0; i < kHeight * kWidth; ++i) clamp_filtered(sums[i], a.lo, a.hi, out[i]);
}

// Where an input pixel of the tile comes from and goes to; -1: nowhere.
struct PixelPlace {
  int32_t from;  // pixels from the first of the tile's first row: less than 2^11 rows have room, of 2^20 pixels at most
  int32_t to;    // bytes in the expanded tile
};

// The tile's input pixels that lie in the image, row by row: what is expanded.
struct TileInput {
  int row, column;    // first
  int height, width;  // may be empty
  int pixels;         // of all images
};

template <class M>
MNV2_DEVICE void zero_expanded(const BlockArgs& a, unsigned char* expanded) {
  const int vectors = a.e_image * a.images / 16;
  MNV2_NO_UNROLL
  for (int i = thread_index(); i < vectors; i += a.threads) reinterpret_cast<Four*>(expanded)[i] = {0, 0, 0, 0};
}

MNV2_DEVICE void copy_bytes(const BlockArgs& a, unsigned char* to, const unsigned char* from, int bytes) {
  MNV2_NO_UNROLL
  for (int i = thread_index() * 16; i < bytes; i += a.threads * 16) copy_async(to + i, from + i, true);
}

// The chunk's weights, all but those of other parts of the output.
MNV2_DEVICE void copy_weights(const BlockArgs& a, int chunk, int part, unsigned char* to) {
  const unsigned char* const from = a.packed + a.first + static_cast<int64_t>(chunk) * a.chunk;
  copy_bytes(a, to, a.expand + static_cast<int64_t>(chunk) * a.expand_chunk, a.filters);
  copy_bytes(a, to + a.filters, from + a.filters_from, a.project - a.filters);
  copy_bytes(a, to + a.project, from + a.project_from + static_cast<int64_t>(part) * a.project_part, a.project_part);
}

// Tiles that lie side by side in a lane's registers: four, or what is left in twos and ones.
MNV2_DEVICE constexpr int tiles_from(int tile, int tiles) { return tiles - tile >= 4 ? 4 : tiles - tile >= 2 ? 2 : 1; }

// Tiles [kFirst, kTiles) of an output pixel: sums, biases and residual to memory. Of kCount neighbouring tiles a lane
// has 2 kCount neighbouring channels. bias, residual and y: of the block's first output channel.
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

template <class M, int kTiles, int kFilter>
MNV2_KERNEL(Block<M, kTiles>::kThreads, Block<M, kTiles>::kBlocks)
block_kernel(const BlockArgs a) {
  using B = Block<M, kTiles>;
  using E = Expanded<M>;
  using T = typename M::Value;
  unsigned char* const shared = shared_memory();
  unsigned char* const x_tile = shared + a.x_at;
  unsigned char* const expanded = shared + a.e_at;
  PixelPlace* const places = reinterpret_cast<PixelPlace*>(shared + a.table_at);
  const int thread = thread_index(), lane = thread % 32, warp = thread / 32, g = lane / 4, t = lane % 4;
  const int warps = a.threads / 32;

  int tile = block_index_x();
  const int tile_column = tile % a.tiles_x * a.tile_w;
  tile /= a.tiles_x;
  const int tile_row = tile % a.tiles_y * a.tile_h;
  const int64_t first_image = static_cast<int64_t>(tile / a.tiles_y) * a.images;
  const int part = block_index_y(), split = block_index_z();
  const int first_chunk = static_cast<int>(static_cast<int64_t>(a.chunks) * split / a.splits);
  const int last_chunk = static_cast<int>(static_cast<int64_t>(a.chunks) * (split + 1) / a.splits);

  copy_weights(a, first_chunk, part, shared + a.weights_at);
  copy_async_commit();

  // The part of the image that the tile needs.
  const int extent = (a.kernel - 1) * a.dilation + 1;
  const int origin_row = tile_row * a.stride - a.pad_top, origin_column = tile_column * a.stride - a.pad_left;
  TileInput in;
  {
    const int rows = a.h_out - tile_row < a.tile_h ? a.h_out - tile_row : a.tile_h;
    const int columns = a.w_out - tile_column < a.tile_w ? a.w_out - tile_column : a.tile_w;
    const int end_row = origin_row + (rows - 1) * a.stride + extent;
    const int end_column = origin_column + (columns - 1) * a.stride + extent;
    in.row = origin_row > 0 ? origin_row : 0;
    in.column = origin_column > 0 ? origin_column : 0;
    in.height = (end_row < a.h ? end_row : a.h) - in.row;
    in.width = (end_column < a.w ? end_column : a.w) - in.column;
    if (in.height < 0 || in.width < 0) in.height = in.width = 0;
    in.pixels = in.height * in.width * a.images;
  }
  const int row_blocks = (in.pixels + B::kExpandRows * 16 - 1) / (B::kExpandRows * 16);
  const int rows = row_blocks * B::kExpandRows * 16;
  MNV2_NO_UNROLL
  for (int i = thread; i < rows; i += a.threads) {
    PixelPlace place{-1, -1};
    if (i < in.pixels) {
      const int image = i / (in.height * in.width), rest = i - image * in.height * in.width;
      const int row = rest / in.width, column = rest - row * in.width + in.column;
      if (first_image + image < a.n) place.from = (image * a.h + row) * a.w + column;
      place.to = image * a.e_image + (in.row + row - origin_row) * a.e_pitch + (column - origin_column) * E::kPixel;
    }
    places[i] = place;
  }
  // Beyond the image's edge the filter reads zeros.
  zero_expanded<M>(a, expanded);
  barrier();

  wait_for_previous_kernel();
  allow_next_kernel();

  const T* const x = static_cast<const T*>(a.x) + (first_image * a.h + in.row) * a.w * a.c_in;
  if (a.has_expand) {
    const int vectors = a.groups * M::kBytes;  // 16 bytes of a pixel
    MNV2_NO_UNROLL
    for (int i = thread; i < rows * vectors; i += a.threads) {
      const int pixel = i / vectors, vector = i - pixel * vectors;
      const int from = places[pixel].from;
      unsigned char* const to = x_tile + pixel * a.x_pitch + vector * 16;
      constexpr int kValues = 16 / M::kBytes;
      if (a.windows) {
        const int rows_down = from / a.w, image = (in.row + rows_down) / a.h;
        const int row = in.row + rows_down - image * a.h, column = from - rows_down * a.w;
        copy_window<T>(to, a.window, first_image + image, row, column, vector * kValues, from >= 0);
      } else {
        copy_vector(to, x + static_cast<int64_t>(from < 0 ? 0 : from) * a.c_in, vector * kValues, a.c_in, from >= 0,
                    a.vectors_in);
      }
    }
    copy_async_commit();
  }

  // This lane's patch.
  const int pairs = (a.patch_rows + 1) / 2, patches = pairs * 2 * a.patch_columns;
  const int index = warp * 8 + g, patch_image = index / patches, patch = index - patch_image * patches;
  const int patch_pair = patch / (2 * a.patch_columns);
  const int patch_row = patch_pair * 2 + patch % 2, patch_column = (patch - patch_pair * 2 * a.patch_columns) / 2;
  const bool in_tile = patch_image < a.images && patch_row < a.patch_rows;
  const unsigned char* const window =
      expanded + t * 16 +
      (in_tile ? patch_image * a.e_image + patch_row * B::kPatchHeight * a.stride * a.e_pitch +
                     patch_column * B::kPatchWidth * a.stride * E::kPixel
               : 0);

  float sums[B::kRows][kTiles][4];
  MNV2_UNROLL
  for (int i = 0; i < B::kValues; ++i) (&sums[0][0][0])[i] = 0.f;

  for (int chunk = first_chunk; chunk < last_chunk; ++chunk) {
    const unsigned char* const weights = shared + a.weights_at + (chunk - first_chunk) % 2 * a.weights_bytes;
    if (!a.has_expand) {
      constexpr int kVectors = 2 * M::kBytes, kValues = 16 / M::kBytes;
      MNV2_NO_UNROLL
      for (int i = thread; i < in.pixels * kVectors; i += a.threads) {
        const PixelPlace place = places[i / kVectors];
        const int vector = i % kVectors;
        const int at = E::kVectors == 1 ? vector * 16 : vector % 2 * E::kVector + vector / 2 * 16;
        copy_vector(expanded + place.to + at, x + static_cast<int64_t>(place.from < 0 ? 0 : place.from) * a.c_in,
                    chunk * 32 + vector * kValues, a.c_in, place.from >= 0, a.vectors_in);
      }
      copy_async_commit();
    }
    copy_async_wait<0>();
    barrier();  // weights and pixels are there, and the expanded tile is free
    if (chunk + 1 < last_chunk && a.weights_bytes > 0) {
      copy_weights(a, chunk + 1, part, shared + a.weights_at + (chunk + 1 - first_chunk) % 2 * a.weights_bytes);
      copy_async_commit();
    }
    if (a.has_expand) {
      const int channels = a.c_hidden - chunk * 32 - t * 8;  // of this lane's eight that exist
      MNV2_NO_UNROLL
      for (int block = warp; block < row_blocks; block += warps) {
        float d[B::kExpandRows][4][4];
        set_bias(d, weights + a.expand_bias, lane);
        const int first = block * B::kExpandRows * 16 + g;
        multiply_chunk<M>(d, x_tile + first * a.x_pitch + t * 4 * M::kBytes, 8 * a.x_pitch, weights, a.groups, lane);
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
          unsigned char* const at = expanded + to + t * 16;
          if constexpr (E::kVectors == 1) {
            store_values(reinterpret_cast<T*>(at), values);
          } else {
            const float low[4] = {values[0], values[1], values[2], values[3]};
            const float high[4] = {values[4], values[5], values[6], values[7]};
            store_values(reinterpret_cast<T*>(at), low);
            store_values(reinterpret_cast<T*>(at + E::kVector), high);
          }
        }
      }
      barrier();
    }

    Filtered<M> filtered[B::kPatch];
    filter_patch<M, B::kPatchHeight, B::kPatchWidth, kFilter>(a, window, weights + a.filters + t * 8 * M::kFilterBytes,
                                                              weights + a.filter_bias + t * 8 * M::kFilterBytes,
                                                              filtered);
    float last[4] = {};
    const unsigned char* project = weights + a.project + lane * 16;
    if constexpr (M::kOperand == 2) {
      Rows<M> rows[2][B::kRows];
      MNV2_UNROLL
      for (int row = 0; row < B::kRows; ++row) {
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
          for (int row = 0; row < B::kRows; ++row) multiply(sums[row][tile], rows[half][row], b[half], last);
        }
      }
    } else {
      MNV2_UNROLL
      for (int half = 0; half < 2; ++half) {
        Rows<M> rows[B::kRows];
        MNV2_UNROLL
        for (int row = 0; row < B::kRows; ++row)
          rows[row].set(filtered[2 * row].half[half], filtered[2 * row + 1].half[half]);
        MNV2_UNROLL
        for (int tile = 0; tile < kTiles; ++tile) {
          warp_barrier();  // else so much is read ahead that registers run out
          Operand<M> b;
          load_operands(project + (half * kTiles + tile) * 512, &b);
          MNV2_UNROLL
          for (int row = 0; row < B::kRows; ++row) multiply(sums[row][tile], rows[row], b, last);
        }
      }
    }
    if (!a.has_expand) barrier();  // before the expanded tile is filled again
    if (chunk + 1 < last_chunk && a.weights_bytes == 0) {
      if (a.has_expand) barrier();  // before the only place for weights is
      copy_weights(a, chunk + 1, part, shared + a.weights_at);
      copy_async_commit();
    }
  }

  if (a.splits > 1) {
    // The last of the tile's blocks adds up the sums of all, in their order.
    const int64_t place = static_cast<int64_t>(block_index_x()) * a.parts + part;
    float* const partial = a.partial + place * a.splits * B::kValues * a.threads + thread;
    float* const to = partial + static_cast<int64_t>(split) * B::kValues * a.threads;
    MNV2_UNROLL
    for (int i = 0; i < B::kValues; ++i) to[i * a.threads] = (&sums[0][0][0])[i];
    memory_fence();
    barrier();
    int* const last = reinterpret_cast<int*>(shared + a.table_at);
    if (thread == 0) {
      *last = atomic_add(a.tickets + place, 1) + 1 == static_cast<uint32_t>(a.splits);
      if (*last) a.tickets[place] = 0;
    }
    barrier();
    if (!*last) return;
    memory_fence();
    MNV2_UNROLL
    for (int i = 0; i < B::kValues; ++i) (&sums[0][0][0])[i] = 0.f;
    for (int s = 0; s < a.splits; ++s) {
      const float* const from = partial + static_cast<int64_t>(s) * B::kValues * a.threads;
      MNV2_UNROLL
      for (int i = 0; i < B::kValues; ++i) {
        if (i % 16 == 0) warp_barrier();  // else so much is read ahead that registers run out
        (&sums[0][0][0])[i] += load_shared_result(from + i * a.threads);
      }
    }
  }

  if (!in_tile || first_image + patch_image >= a.n) return;
  const int first_channel = part * kTiles * 8, channels = a.c_out - first_channel;
  const float* const bias = reinterpret_cast<const float*>(a.packed) + first_channel;
  MNV2_UNROLL
  for (int i = 0; i < B::kPatch; ++i) {
    const int row = patch_row * B::kPatchHeight + i / B::kPatchWidth;
    const int column = patch_column * B::kPatchWidth + i % B::kPatchWidth;
    if (row >= a.tile_h || column >= a.tile_w || tile_row + row >= a.h_out || tile_column + column >= a.w_out) continue;
    const T* residual = nullptr;
    if (a.residual && a.has_expand) {
      const int pixel =
          (patch_image * in.height + tile_row + row - in.row) * in.width + tile_column + column - in.column;
      residual = reinterpret_cast<const T*>(x_tile + pixel * a.x_pitch) + first_channel;
    } else if (a.residual) {
      const int64_t pixel =
          static_cast<int64_t>(patch_image * a.h + tile_row + row - in.row) * a.w + tile_column + column;
      residual = x + pixel * a.c_in + first_channel;
    }
    const int64_t pixel = ((first_image + patch_image) * a.h_out + tile_row + row) * a.w_out + tile_column + column;
    store_pixel<M, kTiles, 0>(a, sums[i / 2], i % 2, t, channels, bias, residual,
                              static_cast<T*>(a.y) + pixel * a.c_out + first_channel);
  }
}

}  // namespace cuda
}  // namespace mnv2
