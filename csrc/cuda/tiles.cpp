#include "tiles.h"

namespace mnv2 {
namespace cuda {

int64_t expand_rows(DType dtype, const Columns& columns) {
  return expanded_at_once(static_cast<int>(element_bytes(dtype)), columns.tiles);
}

int64_t threads_of(DType dtype, const Columns& columns, const Device& device) {
  return threads_at_once(static_cast<int>(filter_bytes(dtype)), columns.tiles, device.cluster > 1);
}

bool takes_rounds(DType dtype, const Columns& columns, int64_t images, int64_t splits) {
  return images == 1 && splits == 1 && takes_rounds(static_cast<int>(element_bytes(dtype)), columns.tiles);
}

Tile make_tile(const BlockShape& s, const DenseShape* stem, DType dtype, const Columns& columns, int64_t height,
               int64_t width, int64_t images, int64_t buffers, bool ahead) {
  const int64_t element = element_bytes(dtype), pixel = kChunk * element;
  const int64_t patch_height = rows_of_warp(static_cast<int>(element), columns.tiles), patch_width = 2;
  const int64_t extent = kernel_extent(s.kernel, s.dilation);
  Tile t{};
  t.height = height, t.width = width, t.images = images;
  t.patch_rows = divide_up(height, patch_height), t.patch_columns = divide_up(width, patch_width);
  t.patches = divide_up(t.patch_rows, 2) * 2 * t.patch_columns * images;
  t.e_height = (t.patch_rows * patch_height - 1) * s.stride + extent;
  // Lanes work on patches in pairs, one below the other: their rows must be half of all banks apart.
  t.e_pitch = ((t.patch_columns * patch_width - 1) * s.stride + extent) * pixel;
  for (int i = 0; i < 8 && patch_height * s.stride * t.e_pitch % 128 != 64; ++i) t.e_pitch += 16;
  t.e_image = std::min(t.e_height * t.e_pitch, kUnfit);
  const int64_t rows = std::min(s.h, (height - 1) * s.stride + extent);
  const int64_t row_pixels = std::min(s.w, (width - 1) * s.stride + extent);
  t.pixels = round_up(std::min(rows * row_pixels * images, kUnfit / 8), expand_rows(dtype, columns));
  const BlockLayout layout = block_layout(s, dtype);
  t.table = kArrivals + round_up(t.pixels * 8, 16);
  t.weights = layout.chunk;
  if (stem) {
    const WindowTile window = window_tile(*stem, dtype, rows, row_pixels);
    t.x = std::min(images * window.image + window.table, kUnfit);
  } else {
    t.x = s.has_expand ? t.pixels * row_pitch(s.c_in, dtype) : 0;
  }
  t.e = t.images * t.e_image + pixel;
  t.weights_at = t.table + t.x;
  t.shared = t.weights_at + buffers * t.weights + (ahead ? 2 : 1) * t.e;
  return t;
}

WindowTile window_tile(const DenseShape& s, DType dtype, int64_t rows, int64_t columns) {
  const int64_t slice = slice_channels(s.c_in, s.kernel), last = s.c_in % slice;
  WindowTile t{};
  t.height = (rows - 1) * s.stride + s.kernel, t.width = (columns - 1) * s.stride + s.kernel;
  t.pitch = row_pitch(t.width * slice, dtype);
  const bool odd = s.stride % 2 != 0 && (slice % 2 != 0 || last % 2 != 0);
  t.shifted = odd && element_bytes(dtype) == 2 ? t.height * t.pitch : 0;
  t.image = t.height * t.pitch + t.shifted;
  t.table = slice_values(slice, s.kernel) / 2 * 8;
  return t;
}

int row_lanes(int64_t values) {
  int lanes = 0;
  while (lanes < 5 && int64_t{4} << lanes < values) ++lanes;
  return lanes;
}

StemTile stem_tile(const DenseShape& s, DType dtype, int64_t shared_block) {
  const int64_t rows = h_out(s), columns = w_out(s);
  StemTile best{};
  int64_t least = 0;
  for (int64_t width = 1; width <= std::min<int64_t>(columns, kStemPixels); ++width) {
    int64_t height = std::min(rows, kStemPixels / width);
    const auto shared = [&] {
      const WindowTile t = window_tile(s, dtype, height, width);
      return t.image + t.table;
    };
    while (height > 1 && shared() > shared_block) height = divide_up(height, 2);
    const int64_t blocks = divide_up(rows, height) * divide_up(columns, width), bytes = shared();
    if (width > 1 && (bytes > shared_block || blocks > least || (blocks == least && bytes >= best.shared))) continue;
    least = blocks, best = {.height = height, .width = width, .shared = bytes};
  }
  return best;
}

}  // namespace cuda
}  // namespace mnv2
