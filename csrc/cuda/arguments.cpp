#include "arguments.h"

#include "tiles.h"

namespace mnv2 {
namespace cuda {
namespace {

int32_t i32(int64_t v) { return static_cast<int32_t>(v); }

// rows, columns: of the windows whose tile lies in shared memory; images: of their tiles.
WindowArgs window_args(const DenseShape& s, const Images& x, DType dtype, int64_t rows, int64_t columns,
                       int64_t images) {
  const int64_t slice = slice_channels(s.c_in, s.kernel);
  const WindowTile t = window_tile(s, dtype, rows, columns);
  const double apart = static_cast<double>(s.c_in - 1) * static_cast<double>(x.strides[1]) +
                       static_cast<double>(s.w - 1) * static_cast<double>(x.strides[3]);
  return {.x = x.data,
          .stride_n = x.strides[0],
          .stride_c = x.strides[1],
          .stride_h = x.strides[2],
          .stride_w = x.strides[3],
          .near = apart < static_cast<double>(kTooMany),
          .h = i32(s.h),
          .w = i32(s.w),
          .c = i32(s.c_in),
          .kernel = i32(s.kernel),
          .stride = i32(s.stride),
          .pad_top = i32(s.pad.top),
          .pad_left = i32(s.pad.left),
          .slice = i32(slice),
          .per_slice = 1 / static_cast<float>(slice),
          .pitch = i32(t.pitch),
          .shifted = i32(t.shifted),
          .image = i32(t.image),
          .table = i32(images * t.image),
          .lanes = row_lanes(t.width * slice)};
}

// Steps of a sum whose values, for `pixels` pixels, fit into shared memory together: all, or shares of them.
int64_t groups_at_once(int64_t groups, int64_t pixels, DType dtype, const Device& device) {
  while (groups > 1 && pixels * row_pitch(groups * kGroup, dtype) > device.shared_block) groups = divide_up(groups, 2);
  return groups;
}

// Of a matrix's chunk: bytes from its start to its biases, which are its end.
int32_t bias_of_matrix(int64_t chunk) { return i32(chunk - kBiasBytes); }

BlockArgs args_of(const BlockShape& s, const DenseShape* stem, const BlockPlan& plan, DType dtype) {
  const BlockLayout layout = block_layout(s, dtype);
  // With a stem the block's own weights expand nothing.
  const BlockLayout in_memory = block_layout(s.has_expand && !stem ? s.c_in : 0, s.c_hidden, s.c_out, s.kernel, dtype);
  const int64_t rest = layout.chunk - layout.filters;
  // Weights that expand come behind the rest if they are those of the next chunk, or the stem's.
  const bool behind = plan.ahead || stem != nullptr;
  const int64_t expand = behind ? rest : 0, before = behind ? layout.filters : 0;
  const Tile t =
      make_tile(s, stem, dtype, plan.columns, plan.tile_h, plan.tile_w, plan.images, plan.buffers, plan.ahead);
  const int64_t e_at = t.shared - (plan.ahead ? 2 : 1) * t.e;
  const int64_t patches = divide_up(t.patch_rows, 2) * 2 * t.patch_columns;
  const int64_t vectors = std::max<int64_t>(groups(s) * element_bytes(dtype), 1);
  return {.n = s.n,
          .x_image = s.h * s.w * s.c_in,
          .y_image = h_out(s) * w_out(s) * s.c_out,
          .h = i32(s.h),
          .w = i32(s.w),
          .h_out = i32(h_out(s)),
          .w_out = i32(w_out(s)),
          .c_in = i32(s.c_in),
          .c_hidden = i32(s.c_hidden),
          .c_out = i32(s.c_out),
          .kernel = i32(s.kernel),
          .stride = i32(s.stride),
          .dilation = i32(s.dilation),
          .pad_top = i32(s.pad.top),
          .pad_left = i32(s.pad.left),
          .expand_lo = s.act.lo,
          .expand_hi = s.act.hi,
          .lo = s.act.lo,
          .hi = s.act.hi,
          .out_lo = s.out.lo,
          .out_hi = s.out.hi,
          .has_expand = s.has_expand,
          .windows = stem != nullptr,
          .residual = s.residual,
          .clamps_out = s.out != kNoActivation,
          .vectors_in = s.c_in * element_bytes(dtype) % 16 == 0,
          .vectors_out = s.c_out % 8 == 0,
          .tile_h = i32(plan.tile_h),
          .tile_w = i32(plan.tile_w),
          .images = i32(plan.images),
          .tiles_y = i32(divide_up(h_out(s), plan.tile_h)),
          .tiles_x = i32(divide_up(w_out(s), plan.tile_w)),
          .rounds = i32(plan.rounds),
          .patch_columns = i32(t.patch_columns),
          .patch_rows = i32(t.patch_rows),
          .per_patches = 1 / static_cast<float>(patches),
          .per_pair = 1 / static_cast<float>(2 * t.patch_columns),
          .chunks = i32(layout.chunks),
          .splits = i32(plan.splits),
          .parts = plan.columns.parts,
          .cluster = plan.cluster,
          .threads = i32(plan.threads),
          .groups = i32(groups(s)),
          .first = i32(in_memory.first - (plan.ahead ? rest : 0)),
          .chunk = i32(in_memory.chunk),
          .rest = i32(rest),
          .stem_chunk = stem ? i32(matrix_chunk(s.c_in, dtype)) : 0,
          .expand = i32(expand),
          .expand_bias = i32(layout.expand_bias),
          .filters = i32(layout.filters - before),
          .filter_bias = i32(layout.filter_bias - before),
          .project = i32(layout.project - before),
          .x_pitch = i32(row_pitch(s.c_in, dtype)),
          .per_vectors = 1 / static_cast<float>(std::min(vectors, plan.threads)),
          .e_pitch = i32(t.e_pitch),
          .e_image = i32(t.e_image),
          .e_second = plan.ahead ? i32(t.e) : 0,
          .ahead = plan.ahead,
          .x_at = i32(t.table),
          .e_at = i32(e_at),
          .weights_at = i32(t.weights_at),
          .table_at = kArrivals,
          .to_at = i32(kArrivals + t.pixels * 4),
          .weights_bytes = plan.buffers > 1 ? i32(t.weights) : 0};
}

}  // namespace

BlockArgs block_args(const BlockShape& s, const BlockPlan& plan, DType dtype) {
  return args_of(s, nullptr, plan, dtype);
}

void set_packed(BlockArgs& args, const unsigned char* packed) {
  args.bias = reinterpret_cast<const float*>(packed), args.weights = packed + args.first;
}

Grid block_grid(const BlockPlan& plan, const BlockArgs& a) {
  return {.x = plan.blocks / plan.columns.parts / plan.splits,
          .y = a.parts,
          .z = a.splits,
          .threads = plan.threads,
          .shared = plan.shared,
          .cluster = plan.cluster ? plan.splits : 1};
}

BlockArgs joined_args(const DenseShape& stem, const Images& x, const BlockShape& s, const BlockPlan& plan,
                      DType dtype) {
  BlockArgs a = args_of(s, &stem, plan, dtype);
  const int64_t extent = kernel_extent(s.kernel, s.dilation);
  a.window = window_args(stem, x, dtype, std::min(s.h, (plan.tile_h - 1) * s.stride + extent),
                         std::min(s.w, (plan.tile_w - 1) * s.stride + extent), plan.images);
  a.expand_lo = stem.act.lo, a.expand_hi = stem.act.hi;
  return a;
}

StemArgs stem_args(const DenseShape& shape, const Images& images, DType dtype, const Device& device) {
  DenseShape s = shape;
  Images x = images;
  // Pixels that are their own windows may lie in one column.
  if (s.kernel == 1 && s.stride == 1 && h_out(s) == s.h && w_out(s) == s.w && x.strides[2] == s.w * x.strides[3])
    s.h *= s.w, s.w = 1, x.strides[2] = x.strides[3];
  const StemTile t = stem_tile(s, dtype, device.shared_block);
  const int64_t chunk = matrix_chunk(window_values(s), dtype);
  return {.window = window_args(s, x, dtype, t.height, t.width, 1),
          .n = s.n,
          .h_out = i32(h_out(s)),
          .w_out = i32(w_out(s)),
          .c_out = i32(s.c_out),
          .lo = s.act.lo,
          .hi = s.act.hi,
          .vectors_out = s.c_out % 8 == 0,
          .tile_h = i32(t.height),
          .tile_w = i32(t.width),
          .tiles_y = i32(divide_up(h_out(s), t.height)),
          .tiles_x = i32(divide_up(w_out(s), t.width)),
          .chunk = i32(chunk),
          .expand_bias = bias_of_matrix(chunk)};
}

Grid stem_grid(const StemArgs& a) {
  return {.x = a.n * a.tiles_y * a.tiles_x,
          .y = divide_up(a.c_out, kChunk),
          .z = 1,
          .threads = kStemThreads,
          .shared = a.window.table + slice_values(a.window.slice, a.window.kernel) / 2 * 8};
}

int64_t pooled_row(const HeadShape& s) { return round_up(s.c_last, kChunk); }

PoolArgs pool_args(const HeadShape& s, DType dtype, const Device& device) {
  const int64_t steps = divide_up(s.c_in, kGroup), chunk = matrix_chunk(s.c_in, dtype);
  // As many thread blocks as run at once, four on a multiprocessor: the images of one find the weights in the L1 cache.
  const int64_t parts = divide_up(s.c_last, kPoolThreads);
  const int64_t images = std::clamp<int64_t>(divide_up(s.n * parts, 4 * device.multiprocessors), 1, kMostPoolImages);
  const bool together = s.n * parts <= device.multiprocessors &&
                        kPoolPixels * row_pitch(steps * kGroup, dtype) + chunk <= device.shared_block;
  const int64_t at_once = together ? steps : groups_at_once(steps, kPoolPixels, dtype, device);
  return {.n = s.n,
          .pixels = s.h * s.w,
          .c_in = i32(s.c_in),
          .c_last = i32(s.c_last),
          .images = i32(images),
          .lo = s.act.lo,
          .hi = s.act.hi,
          .vectors_in = s.c_in * element_bytes(dtype) % 16 == 0,
          .together = together,
          .groups = i32(steps),
          .at_once = i32(at_once),
          .chunk = i32(chunk),
          .expand_bias = bias_of_matrix(chunk),
          .x_pitch = i32(row_pitch(at_once * kGroup, dtype))};
}

Grid pool_grid(const PoolArgs& a) {
  return {.x = divide_up(a.n, a.images),
          .y = divide_up(a.c_last, a.together ? kChunk : kPoolThreads),
          .z = 1,
          .threads = kPoolThreads,
          .shared = int64_t{kPoolPixels} * a.x_pitch + (a.together ? a.chunk : 0)};
}

ClassifyArgs classify_args(const HeadShape& s, DType dtype, const Device& device) {
  const int64_t steps = divide_up(s.c_last, kGroup), chunk = matrix_chunk(s.c_last, dtype);
  const int64_t blocks = divide_up(s.n, kClassifyImages) * divide_up(s.classes, kChunk);
  // All thread blocks of a multiprocessor, up to four, find room at once.
  const int64_t beside = std::clamp<int64_t>(divide_up(blocks, device.multiprocessors), 1, 4);
  const int64_t room = std::min(device.shared_block, device.shared_all / beside - 1024) / kClassifyWarps;
  const auto warp = [&](int64_t groups) {
    const int64_t operands = groups * kGroup * kChunk * element_bytes(dtype);
    const int64_t rows = kClassifyImages * row_pitch(groups * kGroup, dtype);
    return std::max<int64_t>(operands + rows, kClassifyImages * kChunk * 4);
  };
  int64_t at_once = divide_up(steps, kClassifyWarps);
  while (at_once > 1 && warp(at_once) > room) --at_once;
  return {.n = s.n,
          .classes = i32(s.classes),
          .pooled_row = i32(pooled_row(s)),
          .groups = i32(steps),
          .at_once = i32(at_once),
          .chunk = i32(chunk),
          .expand_bias = bias_of_matrix(chunk),
          .x_pitch = i32(row_pitch(at_once * kGroup, dtype)),
          .warp = i32(warp(at_once))};
}

Grid classify_grid(const ClassifyArgs& a) {
  return {.x = divide_up(a.n, kClassifyImages),
          .y = divide_up(a.classes, kChunk),
          .z = 1,
          .threads = kClassifyThreads,
          .shared = int64_t{kClassifyWarps} * a.warp};
}

PackArgs block_pack_args(int64_t c_in, int64_t c_hidden, int64_t c_out, int64_t kernel, DType dtype) {
  const BlockLayout l = block_layout(c_in, c_hidden, c_out, kernel, dtype);
  const Columns columns = columns_of(c_out);
  const int64_t steps = divide_up(c_in, kGroup), outputs = int64_t{columns.tiles} * kTile;
  const int64_t expand_values = c_in > 0 ? steps * kGroup + 2 : 0, filter_values = kernel * kernel + 1;
  const int64_t chunk_values = (expand_values + filter_values + outputs) * kChunk;
  return {.channels = i32(c_in),
          .kernel = 1,
          .slice = i32(slice_channels(std::max<int64_t>(c_in, 1), 1)),
          .groups = i32(steps),
          .c_hidden = i32(c_hidden),
          .c_out = i32(c_out),
          .filter_taps = i32(kernel * kernel),
          .parts = columns.parts,
          .tiles = columns.tiles,
          .chunks = i32(l.chunks),
          .first = l.first,
          .chunk = l.chunk,
          .expand_bias_at = l.expand_bias,
          .filters_at = l.filters,
          .project_at = l.project,
          .chunk_values = chunk_values,
          .values = columns.parts * (outputs + l.chunks * chunk_values)};
}

PackArgs matrix_pack_args(int64_t channels, int64_t kernel, int64_t columns, DType dtype) {
  const int64_t rows = window_values(channels, kernel), steps = rows / kGroup, chunks = divide_up(columns, kChunk);
  const int64_t chunk = matrix_chunk(rows, dtype), chunk_values = (rows + 2) * kChunk;
  return {.channels = i32(channels),
          .kernel = i32(kernel),
          .slice = i32(slice_channels(channels, kernel)),
          .groups = i32(steps),
          .c_hidden = i32(columns),
          .c_out = 0,
          .filter_taps = 0,
          .parts = 1,
          .tiles = 0,
          .chunks = i32(chunks),
          .first = 0,
          .chunk = chunk,
          .expand_bias_at = bias_of_matrix(chunk),
          .filters_at = 0,
          .project_at = 0,
          .chunk_values = chunk_values,
          .values = chunks * chunk_values};
}

Grid pack_grid(const PackArgs& a) {
  return {.x = divide_up(a.values, kPackThreads), .y = 1, .z = 1, .threads = kPackThreads, .shared = 0};
}

}  // namespace cuda
}  // namespace mnv2
