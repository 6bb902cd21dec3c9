#include "plan.h"

#include <algorithm>
#include <stdexcept>

namespace mnv2 {
namespace cuda {
namespace {

constexpr int64_t kMostTile = 32;               // pixels, either way
constexpr int64_t kUnfit = int64_t{1} << 30;    // bytes, of which no thread block has so many
constexpr int64_t kTooMany = int64_t{1} << 31;  // thread blocks of a launch, pixels and bytes that kernels count

// The tile's shape in patches and in shared memory.
struct Tile {
  int64_t height, width, images;  // output pixels
  int64_t patch_rows, patch_columns, patches;
  int64_t e_pitch, e_image, e_height;
  int64_t pixels;  // expanded, rounded up to what is multiplied at once
  int64_t table, weights, x, shared;
};

int32_t i32(int64_t v) { return static_cast<int32_t>(v); }

int64_t groups(const BlockShape& s) { return s.has_expand ? divide_up(s.c_in, kGroup) : 0; }

// Bytes of a pixel's row in shared memory, such that the rows of neighbouring pixels meet no bank twice.
int64_t row_pitch(int64_t channels, DType dtype) {
  return (divide_up(channels, kGroup) | 1) * kGroup * element_bytes(dtype);
}

int64_t expand_rows(DType dtype, const Columns& columns) {
  return expanded_at_once(static_cast<int>(element_bytes(dtype)), columns.tiles);
}

Tile make_tile(const BlockShape& s, DType dtype, const Columns& columns, int64_t height, int64_t width, int64_t images,
               int64_t buffers) {
  const int64_t element = element_bytes(dtype), pixel = kChunk * element;
  const int64_t patch_height = rows_of_warp(static_cast<int>(element), columns.tiles), patch_width = 2;
  const int64_t extent = kernel_extent(s.kernel, s.dilation);
  Tile t{};
  t.height = height, t.width = width, t.images = images;
  t.patch_rows = divide_up(height, patch_height), t.patch_columns = divide_up(width, patch_width);
  t.patches = divide_up(t.patch_rows, 2) * 2 * t.patch_columns * images;
  t.e_height = (t.patch_rows * patch_height - 1) * s.stride + extent;
  // Lanes work on patches in pairs, one below the other: their rows have to be half of all banks apart.
  t.e_pitch = ((t.patch_columns * patch_width - 1) * s.stride + extent) * pixel;
  for (int i = 0; i < 8 && patch_height * s.stride * t.e_pitch % 128 != 64; ++i) t.e_pitch += 16;
  t.e_image = std::min(t.e_height * t.e_pitch, kUnfit);
  const int64_t rows = std::min(s.h, (height - 1) * s.stride + extent);
  const int64_t row_pixels = std::min(s.w, (width - 1) * s.stride + extent);
  t.pixels = round_up(std::min(rows * row_pixels * images, kUnfit / 8), expand_rows(dtype, columns));
  const BlockLayout layout = block_layout(s, dtype);
  t.table = round_up(t.pixels * 8, 16);
  t.weights = layout.project + layout.project_part;
  t.x = s.has_expand ? t.pixels * row_pitch(s.c_in, dtype) : 0;
  t.shared = t.table + buffers * t.weights + t.x + t.images * t.e_image;
  return t;
}

// Cycles that a chunk of 32 hidden channels keeps a multiprocessor's parts busy.
struct Busy {
  double shared, tensor, issue;

  double phase() const { return std::max({shared, tensor, issue}); }
};

// Multiply-adds a cycle: mma.sync in 16 bits, half of that in tf32, of which an exact product takes four.
double tensor_rate(DType dtype, bool exact) { return dtype != DType::kFloat32 ? 1024 : exact ? 128 : 512; }
// What a product of 16 x 8 sums over 16 in fp32 issues beside it: rounding; splitting, adding up, and six products
// more.
double conversions(DType dtype, bool exact) { return dtype != DType::kFloat32 ? 0 : exact ? 64 : 6; }

// Bytes through shared memory at 128 a cycle, products as above, instructions at four a cycle. Two phases, between
// barriers.
struct ChunkCost {
  Busy expand, project;
};

ChunkCost chunk_cost(const BlockShape& s, DType dtype, bool exact, const Columns& columns, const Tile& t,
                     int64_t warps) {
  const double element = static_cast<double>(element_bytes(dtype)), filter = static_cast<double>(filter_bytes(dtype));
  const double rate = tensor_rate(dtype, exact);
  const double steps = static_cast<double>(groups(s)), pixels = static_cast<double>(t.pixels);
  ChunkCost c{};
  if (s.has_expand) {
    const double products = pixels / static_cast<double>(expand_rows(dtype, columns));
    c.expand.shared = (pixels * (steps * kGroup + kChunk) * element + products * steps * 512 * element) / 128;
    c.expand.tensor = pixels * steps * kGroup * kChunk / rate;
    c.expand.issue = products * (steps * (8 * 2 + 10 + 4 * conversions(dtype, exact)) + 80) / 4;
  } else {
    c.expand.shared = pixels * kChunk * element / 128;
  }
  const int64_t height = rows_of_warp(static_cast<int>(element_bytes(dtype)), columns.tiles);
  const int64_t columns_read = s.stride + s.kernel;
  const int64_t rows_read = s.stride == 1 && s.kernel == 3 ? height + 2 : height * s.kernel;
  const double reads = static_cast<double>(rows_read * columns_read);  // of 16 or 32 bytes, by each lane
  const double taps = static_cast<double>(s.kernel * s.kernel), patch = static_cast<double>(2 * height);
  const double w = static_cast<double>(warps), tiles = columns.tiles;
  c.project.shared =
      (w * (reads * 256 * element + taps * 64 * filter + tiles * 256 * element) + static_cast<double>(t.weights)) / 128;
  c.project.tensor = w * tiles * 8 * static_cast<double>(height) * 16 * kChunk / rate;
  c.project.issue = w *
                    (taps * patch * (filter == 2 ? 4 : 8) + reads * (filter == 2 ? 1.5 : 9) +
                     tiles * (2 * static_cast<double>(height) * (1 + conversions(dtype, exact)) + 1)) /
                    4;
  return c;
}

WindowArgs window_args(const DenseShape& s) {
  WindowArgs a{};
  a.h = i32(s.h), a.w = i32(s.w), a.c = i32(s.c_in);
  a.kernel = i32(s.kernel), a.stride = i32(s.stride), a.pad_top = i32(s.pad.top), a.pad_left = i32(s.pad.left);
  return a;
}

constexpr double kStart = 2000;  // cycles until a block's pixels have come, and for its output to go
constexpr double kWait = 300;    // that a chunk's barriers and dependent loads add
constexpr double kJoin = 2500;   // for the sums of split channels
constexpr double kBytes = 18;    // of memory a cycle and multiprocessor
constexpr double kRead = 600;    // that a thread waits for a value from memory

// Instructions of a thread, counted in the source: to find and copy 16 bytes of a pixel; the same of a stem's window,
// with five divisions, and besides for every value.
constexpr double kCopyVector = 40, kCopyWindow = 120, kCopyValue = 20;

// What of a map of `size` the tiles along an axis read, all together; `inner`: what of a stem's image these pixels
// read.
struct Axis {
  int64_t size, out, tile, stride, pad, extent;
};
struct Reads {
  int64_t map, image;
};
Reads reads_along(const Axis& a, const Axis* inner) {
  Reads sum{};
  for (int64_t first = 0; first < a.out; first += a.tile) {
    const int64_t last = std::min(first + a.tile, a.out) - 1;
    const int64_t from = std::max<int64_t>(first * a.stride - a.pad, 0);
    const int64_t to = std::min(last * a.stride - a.pad + a.extent, a.size);
    if (to <= from) continue;
    sum.map += to - from;
    if (inner == nullptr) continue;
    sum.image += std::min((to - 1) * inner->stride - inner->pad + inner->extent, inner->size) -
                 std::max<int64_t>(from * inner->stride - inner->pad, 0);
  }
  return sum;
}

// Cycles that `rows` windows of `values` values take to issue.
double window_issue(double rows, double values, DType dtype) {
  return rows * values * (kCopyValue + kCopyWindow * static_cast<double>(element_bytes(dtype)) / 16) / 32 / 4;
}

// A block's, or with a stem that of both.
Load load_of(const BlockShape& s, const DenseShape* stem, const BlockPlan& p, DType dtype, bool exact,
             const Device& device) {
  const Tile t = make_tile(s, dtype, p.columns, p.tile_h, p.tile_w, p.images, p.buffers);
  const ChunkCost cost = chunk_cost(s, dtype, exact, p.columns, t, p.threads / 32);
  const double processors = static_cast<double>(device.multiprocessors), blocks = static_cast<double>(p.blocks);
  const int64_t chunks = divide_up(s.c_hidden, kChunk), extent = kernel_extent(s.kernel, s.dilation);
  const double tiles = static_cast<double>(p.blocks / p.splits) / processors, all = tiles * static_cast<double>(chunks);
  Load l{};
  l.shared = all * (cost.expand.shared + cost.project.shared);
  l.tensor = all * (cost.expand.tensor + cost.project.tensor);
  l.issue = all * (cost.expand.issue + cost.project.issue);
  l.cycles = p.cycles;
  Axis rows{s.h, h_out(s), p.tile_h, s.stride, s.pad.top, extent};
  Axis columns{s.w, w_out(s), p.tile_w, s.stride, s.pad.left, extent};
  const int64_t element = element_bytes(dtype);
  int64_t bytes = block_layout(s, dtype).size + s.n * h_out(s) * w_out(s) * s.c_out * element;
  if (stem) {
    const Axis image_rows{stem->h, 0, 0, stem->stride, stem->pad.top, stem->kernel};
    const Axis image_columns{stem->w, 0, 0, stem->stride, stem->pad.left, stem->kernel};
    bytes +=
        s.n * reads_along(rows, &image_rows).image * reads_along(columns, &image_columns).image * stem->c_in * element;
    const int64_t values = groups(s) * kGroup;
    const double once = window_issue(static_cast<double>(t.pixels), static_cast<double>(values), dtype);
    l.issue += blocks / processors * once;
    // A thread waits for 16 bytes before it begins the next.
    const double waits = static_cast<double>(divide_up(t.pixels * values * element / 16, p.threads)) * kRead;
    const double waves = static_cast<double>(divide_up(p.blocks, device.multiprocessors * p.at_once));
    l.cycles += waves * std::max(waits, static_cast<double>(p.at_once) * once);
  } else {
    bytes += s.n * reads_along(rows, nullptr).map * reads_along(columns, nullptr).map * s.c_in * element;
    const double vectors = static_cast<double>(t.pixels * divide_up(s.c_in * element, 16));
    l.issue += (s.has_expand ? blocks / processors : tiles) * vectors * kCopyVector / 32 / 4;
  }
  l.bytes = static_cast<double>(bytes);
  l.cycles = std::max({l.cycles, l.shared, l.tensor, l.issue});
  return l;
}

// A launch of the network's ends, whose threads have up to 128 registers: `reads` of memory, one after the other, by
// every thread block.
void predict_end(Load& l, const Grid& grid, double reads, const Device& device) {
  const int64_t by_shared = std::max<int64_t>(device.shared_all / (grid.shared + 1024), 1);
  const int64_t at_once = std::min<int64_t>(2048 / 4 / grid.threads, by_shared);
  const double waves = static_cast<double>(divide_up(grid.x * grid.y, device.multiprocessors * at_once));
  l.cycles = std::max({l.shared, l.tensor, l.issue, waves * reads * kRead}) + kStart;
}

constexpr int64_t kMostPoolImages = 8;

constexpr const char* kTooLarge = "it has too many pixels or channels for the GPU's 32-bit counters";

bool blocks_fit(int64_t of_image, int64_t images) {
  return static_cast<double>(of_image) * static_cast<double>(images) < static_cast<double>(kTooMany);
}

// Steps of a sum whose values, of so many pixels, fit into shared memory together: all, or shares of them.
int64_t groups_at_once(int64_t groups, int64_t pixels, DType dtype, const Device& device) {
  while (groups > 1 && pixels * row_pitch(groups * kGroup, dtype) > device.shared_block) groups = divide_up(groups, 2);
  return groups;
}

}  // namespace

Device known_device(const std::string& name) {
  if (name == "sm_80") return {108, 163 << 10, 164 << 10, false};
  if (name == "sm_86") return {72, 99 << 10, 100 << 10, false};
  if (name == "sm_90") return {132, 227 << 10, 228 << 10, true};
  throw std::invalid_argument("plan: device must be sm_80, sm_86 or sm_90, got " + name);
}

BlockPlan plan_tile(const BlockShape& s, DType dtype, const Device& device, int64_t tile_h, int64_t tile_w,
                    int64_t images, int64_t splits, int64_t buffers) {
  const Columns columns = columns_of(s.c_out);
  if (divide_up(divide_up(s.c_hidden, kChunk), splits) == 1) buffers = 1;
  const Tile t = make_tile(s, dtype, columns, tile_h, tile_w, images, buffers);
  const int64_t tiles_of_image = divide_up(h_out(s), tile_h) * divide_up(w_out(s), tile_w);
  if (t.patches > kMostThreads / 4 || t.shared > device.shared_block ||
      !blocks_fit(tiles_of_image, divide_up(s.n, images)))
    return {};
  const int64_t tiles = tiles_of_image * divide_up(s.n, images);
  const int64_t chunks = divide_up(s.c_hidden, kChunk), blocks = tiles * columns.parts * splits;
  const int64_t warps = std::max<int64_t>(divide_up(t.patches, 8), 4);
  const int64_t by_registers = std::max<int64_t>(1, 2048 / 8 / (32 * warps)) *
                               blocks_at_once(static_cast<int>(filter_bytes(dtype)), columns.tiles);
  const int64_t at_once = std::min(by_registers, device.shared_all / (t.shared + 1024));
  const double waves = static_cast<double>(divide_up(blocks, device.multiprocessors * at_once));
  const double filled =
      std::min<double>(static_cast<double>(at_once), static_cast<double>(divide_up(blocks, device.multiprocessors)));
  const ChunkCost cost = chunk_cost(s, dtype, false, columns, t, warps);
  const double work = cost.expand.phase() + cost.project.phase();
  const double steps = static_cast<double>(divide_up(chunks, splits));
  const double reload = buffers == 1 && steps > 1 ? static_cast<double>(t.weights) / kBytes : 0;
  const double load = static_cast<double>(t.pixels * s.c_in * element_bytes(dtype)) / kBytes;
  BlockPlan plan{};
  plan.fits = true;
  plan.tile_h = tile_h, plan.tile_w = tile_w, plan.images = images;
  plan.threads = 32 * warps;
  plan.splits = splits, plan.buffers = buffers;
  plan.columns = columns;
  plan.blocks = blocks, plan.at_once = at_once, plan.shared = t.shared;
  if (splits > 1) {
    const int64_t height = rows_of_warp(static_cast<int>(element_bytes(dtype)), columns.tiles);
    plan.partial = blocks * height * columns.tiles * 4 * plan.threads, plan.tickets = tiles * columns.parts;
  }
  plan.cycles = waves * (std::max(filled * (steps * work + load), steps * (work + kWait + reload) + load) + kStart +
                         (splits > 1 ? kJoin : 0));
  return plan;
}

namespace {

// Of all tiles and splits the quickest.
BlockPlan best_plan(const BlockShape& s, DType dtype, const Device& device, int64_t buffers) {
  BlockPlan best{};
  const int64_t chunks = divide_up(s.c_hidden, kChunk), height = h_out(s), width = w_out(s);
  for (int64_t tile_h = 1; tile_h <= std::min(height, kMostTile); ++tile_h) {
    for (int64_t tile_w = 1; tile_w <= std::min(width, kMostTile); ++tile_w) {
      if (divide_up(tile_h, 4) * divide_up(tile_w, 2) * 2 > kMostThreads / 4) break;  // of the larger patches
      const bool whole = tile_h == height && tile_w == width;
      for (int64_t images = 1; images <= (whole ? std::min<int64_t>(s.n, 16) : 1); ++images) {
        for (int64_t splits = 1; splits <= std::min<int64_t>(chunks, 32); splits *= 2) {
          const BlockPlan plan = plan_tile(s, dtype, device, tile_h, tile_w, images, splits, buffers);
          if (plan.fits && splits > 1 && plan.blocks > 2 * device.multiprocessors) break;
          if (plan.fits && (!best.fits || plan.cycles < best.cycles)) best = plan;
        }
      }
    }
  }
  return best;
}

}  // namespace

BlockPlan plan_block(const BlockShape& s, DType dtype, const Device& device) {
  if (s.n == 0) return {};
  const BlockPlan plan = best_plan(s, dtype, device, 2);
  return plan.fits ? plan : best_plan(s, dtype, device, 1);
}

std::string unfit(const BlockShape& s, DType dtype, int64_t shared_block) {
  const Tile least = make_tile(s, dtype, columns_of(s.c_out), 1, 1, 1, 1);
  if (least.shared > shared_block)
    return "it needs " + std::to_string(least.shared) + " bytes of shared memory, and a thread block can have " +
           std::to_string(shared_block);
  const bool fits =
      blocks_fit(h_out(s) * w_out(s), s.n) || plan_block(s, dtype, {1, shared_block, shared_block + 1024, false}).fits;
  return fits ? "" : kTooLarge;
}

std::string unfit(const DenseShape& s, DType dtype) {
  const int64_t area = h_out(s) * w_out(s);
  const bool fits = area <= kTooMany - kStemPixels && blocks_fit(divide_up(area, kStemPixels), s.n) &&
                    matrix_chunk(s.kernel * s.kernel * s.c_in, dtype) < kTooMany;
  return fits ? "" : kTooLarge;
}

std::string unfit(const HeadShape& s) { return blocks_fit(1, divide_up(s.n, kMostPoolImages)) ? "" : kTooLarge; }

std::string unfit(const NetworkShape& s, DType dtype, int64_t shared_block) {
  if (const std::string why = unfit(s.stem, dtype); !why.empty()) return "the stem: " + why;
  for (size_t i = 0; i < s.blocks.size(); ++i)
    if (const std::string why = unfit(s.blocks[i], dtype, shared_block); !why.empty())
      return "block " + std::to_string(i + 1) + ": " + why;
  const std::string why = unfit(s.head);
  return why.empty() ? "" : "the head: " + why;
}

Load block_load(const BlockShape& s, const BlockPlan& plan, DType dtype, bool exact, const Device& device) {
  return load_of(s, nullptr, plan, dtype, exact, device);
}

BlockArgs block_args(const BlockShape& s, const BlockPlan& plan, DType dtype) {
  const BlockLayout layout = block_layout(s, dtype);
  const Tile t = make_tile(s, dtype, plan.columns, plan.tile_h, plan.tile_w, plan.images, plan.buffers);
  BlockArgs a{};
  a.n = s.n;
  a.h = i32(s.h), a.w = i32(s.w), a.h_out = i32(h_out(s)), a.w_out = i32(w_out(s));
  a.c_in = i32(s.c_in), a.c_hidden = i32(s.c_hidden), a.c_out = i32(s.c_out);
  a.kernel = i32(s.kernel), a.stride = i32(s.stride), a.dilation = i32(s.dilation);
  a.pad_top = i32(s.pad.top), a.pad_left = i32(s.pad.left);
  a.expand_lo = a.lo = s.act.lo, a.expand_hi = a.hi = s.act.hi;
  a.has_expand = s.has_expand, a.residual = s.residual;
  a.vectors_in = s.c_in * element_bytes(dtype) % 16 == 0;
  a.vectors_out = s.c_out % 8 == 0;
  a.tile_h = i32(plan.tile_h), a.tile_w = i32(plan.tile_w), a.images = i32(plan.images);
  a.tiles_y = i32(divide_up(h_out(s), plan.tile_h)), a.tiles_x = i32(divide_up(w_out(s), plan.tile_w));
  a.patch_columns = i32(t.patch_columns), a.patch_rows = i32(t.patch_rows);
  a.chunks = i32(layout.chunks), a.splits = i32(plan.splits), a.parts = plan.columns.parts;
  a.threads = i32(plan.threads);
  a.groups = i32(groups(s));
  a.first = i32(layout.first), a.chunk = i32(layout.chunk), a.expand_bias = i32(layout.expand_bias);
  a.filters = i32(layout.filters), a.filter_bias = i32(layout.filter_bias);
  a.project = i32(layout.project), a.project_part = i32(layout.project_part);
  a.expand_chunk = a.chunk, a.filters_from = a.filters, a.project_from = a.project;
  a.x_pitch = i32(row_pitch(s.c_in, dtype));
  a.e_pitch = i32(t.e_pitch), a.e_image = i32(t.e_image);
  a.table_at = 0;
  a.weights_at = i32(t.table), a.weights_bytes = plan.buffers > 1 ? i32(t.weights) : 0;
  a.x_at = i32(t.shared - t.images * t.e_image - t.x);
  a.e_at = i32(t.shared - t.images * t.e_image);
  return a;
}

Grid block_grid(const BlockPlan& plan, const BlockArgs& a) {
  const int64_t tiles = plan.blocks / plan.columns.parts / plan.splits;
  return {tiles, a.parts, a.splits, plan.threads, plan.shared};
}

StemArgs stem_args(const DenseShape& s, DType dtype, const Device& device) {
  const int64_t area = s.kernel * s.kernel * s.c_in;
  StemArgs a{};
  a.window = window_args(s);
  a.n = s.n;
  a.h_out = i32(h_out(s)), a.w_out = i32(w_out(s)), a.c_out = i32(s.c_out);
  a.lo = s.act.lo, a.hi = s.act.hi;
  a.vectors_out = s.c_out % 8 == 0;
  a.groups = i32(divide_up(area, kGroup)), a.at_once = i32(groups_at_once(a.groups, kStemPixels, dtype, device));
  a.chunk = i32(matrix_chunk(area, dtype)), a.expand_bias = a.chunk - kChunk * 4;
  a.x_pitch = i32(row_pitch(int64_t{a.at_once} * kGroup, dtype));
  return a;
}

Grid stem_grid(const StemArgs& a) {
  return {a.n * divide_up(int64_t{a.h_out} * a.w_out, kStemPixels), divide_up(a.c_out, kChunk), 1, kStemThreads,
          int64_t{kStemPixels} * a.x_pitch};
}

Load stem_load(const DenseShape& s, DType dtype, bool exact, const Device& device) {
  const StemArgs a = stem_args(s, dtype, device);
  const Grid grid = stem_grid(a);
  const double processors = static_cast<double>(device.multiprocessors), element = element_bytes(dtype);
  const double rows = static_cast<double>(grid.x * grid.y * kStemPixels) / processors, steps = a.groups;
  const double values = steps * kGroup;
  Load l{};
  l.shared = rows * 2 * values * element / 128;
  l.tensor = rows * values * kChunk / tensor_rate(dtype, exact);
  l.issue =
      window_issue(rows, values, dtype) + rows / 32 * (steps * (8 * 2 + 10 + 8 * conversions(dtype, exact)) + 80) / 4;
  l.bytes = static_cast<double>(s.n * s.c_in * s.h * s.w + s.n * h_out(s) * w_out(s) * s.c_out) * element +
            static_cast<double>(matrix_size(s.kernel * s.kernel * s.c_in, s.c_out, dtype));
  predict_end(l, grid, values * element / 16 + steps, device);
  return l;
}

int64_t pooled_row(const HeadShape& s) { return round_up(s.c_last, kChunk); }

PoolArgs pool_args(const HeadShape& s, DType dtype, const Device& device) {
  PoolArgs a{};
  a.n = s.n, a.pixels = s.h * s.w;
  a.c_in = i32(s.c_in), a.c_last = i32(s.c_last);
  a.lo = s.act.lo, a.hi = s.act.hi;
  a.vectors_in = s.c_in * element_bytes(dtype) % 16 == 0;
  a.groups = i32(divide_up(s.c_in, kGroup)), a.at_once = i32(groups_at_once(a.groups, kPoolPixels, dtype, device));
  a.chunk = i32(matrix_chunk(s.c_in, dtype)), a.expand_bias = a.chunk - kChunk * 4;
  a.x_pitch = i32(row_pitch(int64_t{a.at_once} * kGroup, dtype));
  // Images one after the other find the weights in the L1 cache, as long as there is work for all multiprocessors.
  const int64_t parts = divide_up(s.c_last, kPoolThreads);
  a.images = i32(std::clamp<int64_t>(s.n * parts / (4 * device.multiprocessors), 1, kMostPoolImages));
  return a;
}

Grid pool_grid(const PoolArgs& a) {
  return {divide_up(a.n, a.images), divide_up(a.c_last, kPoolThreads), 1, kPoolThreads,
          int64_t{kPoolPixels} * a.x_pitch};
}

Load pool_load(const HeadShape& s, DType dtype, bool exact, const Device& device) {
  const PoolArgs a = pool_args(s, dtype, device);
  const Grid grid = pool_grid(a);
  const double processors = static_cast<double>(device.multiprocessors), element = element_bytes(dtype);
  const double rounds = static_cast<double>(divide_up(a.pixels, kPoolPixels)), steps = a.groups;
  const double all = static_cast<double>(s.n * grid.y) * rounds / processors, warps = kPoolThreads / 32;
  const double row = static_cast<double>(row_pitch(s.c_in, dtype));
  Load l{};
  // Every warp reads all rows; weights come from the L1 cache, which is the same memory.
  l.shared = all * (kPoolPixels * row * (1 + warps) + warps * steps * 512 * element) / 128;
  l.tensor = all * kPoolPixels * steps * kGroup * kPoolThreads / tensor_rate(dtype, exact);
  l.issue = all *
            (warps * (steps * (16 * 2 + 12 + 16 * conversions(dtype, exact)) + 300) +
             kPoolPixels * steps * element * kCopyVector / 32) /
            4;
  l.bytes = static_cast<double>(s.n * a.pixels * s.c_in + s.n * pooled_row(s)) * element +
            static_cast<double>(matrix_size(s.c_in, s.c_last, dtype));
  predict_end(l, grid, rounds * (a.images + steps), device);
  return l;
}

ClassifyArgs classify_args(const HeadShape& s, DType dtype) {
  ClassifyArgs a{};
  a.n = s.n;
  a.classes = i32(s.classes), a.pooled_row = i32(pooled_row(s));
  a.groups = i32(divide_up(s.c_last, kGroup)), a.chunk = i32(matrix_chunk(s.c_last, dtype));
  a.expand_bias = a.chunk - kChunk * 4;
  return a;
}

Grid classify_grid(const ClassifyArgs& a) {
  return {divide_up(a.n, kClassifyImages), divide_up(a.classes, kChunk), 1, kClassifyThreads,
          kClassifyThreads / 32 * kClassifyImages * kChunk * 4};
}

Load classify_load(const HeadShape& s, DType dtype, const Device& device) {
  const ClassifyArgs a = classify_args(s, dtype);
  const Grid grid = classify_grid(a);
  const double blocks = static_cast<double>(grid.x * grid.y) / static_cast<double>(device.multiprocessors);
  const double element = element_bytes(dtype), steps = a.groups, warps = kClassifyThreads / 32;
  Load l{};
  l.shared =
      blocks * (steps * (512 + kClassifyImages * kGroup) * element + 2 * warps * kClassifyImages * kChunk * 4) / 128;
  l.tensor = blocks * kClassifyImages * steps * kGroup * kChunk / tensor_rate(dtype, true);
  l.issue = blocks * (steps * (4 * 2 + 8 + 4 * conversions(dtype, true)) + warps * 300) / 4;
  l.bytes = static_cast<double>(s.n * (pooled_row(s) + s.classes)) * element +
            static_cast<double>(matrix_size(s.c_last, s.classes, dtype));
  predict_end(l, grid, steps / warps, device);
  return l;
}

PackArgs block_pack_args(int64_t c_in, int64_t c_hidden, int64_t c_out, int64_t kernel, DType dtype) {
  const BlockLayout l = block_layout(c_in, c_hidden, c_out, kernel, dtype);
  const Columns columns = columns_of(c_out);
  PackArgs a{};
  a.channels = i32(c_in), a.taps = 1, a.groups = i32(divide_up(c_in, kGroup));
  a.c_hidden = i32(c_hidden), a.c_out = i32(c_out), a.filter_taps = i32(kernel * kernel);
  a.parts = columns.parts, a.tiles = columns.tiles, a.chunks = i32(l.chunks);
  a.first = l.first, a.chunk = l.chunk;
  a.expand_bias_at = l.expand_bias, a.filters_at = l.filters, a.project_at = l.project;
  const int64_t outputs = int64_t{a.parts} * a.tiles * kTile;
  a.chunk_values = (c_in > 0 ? a.groups * kGroup + 1 : 0) * kChunk + (kernel * kernel + 1) * kChunk + outputs * kChunk;
  a.values = outputs + l.chunks * a.chunk_values;
  return a;
}

PackArgs matrix_pack_args(int64_t channels, int64_t taps, int64_t columns, DType dtype) {
  PackArgs a{};
  a.channels = i32(channels), a.taps = i32(taps), a.groups = i32(divide_up(channels * taps, kGroup));
  a.c_hidden = i32(columns), a.chunks = i32(divide_up(columns, kChunk));
  a.chunk = matrix_chunk(channels * taps, dtype);
  a.expand_bias_at = a.chunk - kChunk * 4;
  a.chunk_values = (a.groups * kGroup + 1) * kChunk;
  a.values = a.chunks * a.chunk_values;
  return a;
}

Grid pack_grid(const PackArgs& a) { return {divide_up(a.values, kPackThreads), 1, 1, kPackThreads, 0}; }

bool joins(const DenseShape& stem, const BlockShape& block) {
  return !block.has_expand && !block.residual && stem.c_out == block.c_in;
}

BlockShape joined(const DenseShape& stem, const BlockShape& block) {
  BlockShape s = block;
  s.has_expand = true;
  s.c_in = stem.kernel * stem.kernel * stem.c_in;
  return s;
}

Load joined_load(const DenseShape& stem, const BlockShape& s, const BlockPlan& plan, DType dtype, bool exact,
                 const Device& device) {
  return load_of(s, &stem, plan, dtype, exact, device);
}

BlockArgs joined_args(const DenseShape& stem, const BlockShape& s, const BlockPlan& plan, DType dtype) {
  BlockArgs a = block_args(s, plan, dtype);
  const BlockLayout layout = block_layout(0, s.c_hidden, s.c_out, s.kernel, dtype);
  a.first = i32(layout.first), a.chunk = i32(layout.chunk), a.expand_chunk = i32(matrix_chunk(s.c_in, dtype));
  a.filters_from = i32(layout.filters), a.project_from = i32(layout.project);
  a.windows = true;
  a.window = window_args(stem);
  a.expand_lo = stem.act.lo, a.expand_hi = stem.act.hi;
  return a;
}

}  // namespace cuda
}  // namespace mnv2
