#include "cost.h"

#include <cmath>
#include <iterator>

#include "arguments.h"
#include "issue.h"
#include "tiles.h"

namespace mnv2 {
namespace cuda {
namespace {

// These are fitted to the times of 2,400 plans of MobileNetV2's blocks on an H200, at batch 1, 32 and 256 in fp16; see
// NOTES.md. Cycles, but for kBytes.
constexpr double kLaunch = 6500;       // until a launch's first pixels are there, and after its last
constexpr double kWait = 1380;         // of a chunk's barriers and dependent loads
constexpr double kInTurn = 5.1;        // from four instructions of a warp to the next four
constexpr double kSharedOfAll = 0.62;  // of the cycles in shared memory, for each thread block of a multiprocessor
constexpr double kSharedAlone = 0.2;   // and once
constexpr double kBytes = 5.5;         // of the input, a cycle and multiprocessor, for each thread block and once
constexpr double kJoinCluster = 780;   // to add up the sums of a split in a cluster
constexpr double kRead = 600;          // that a thread waits for a value from memory
constexpr double kStart = 2000;        // until a launch of the network's ends has its first pixels, and after its last

// What a chunk of 32 hidden channels, or a phase of it between barriers, needs of a multiprocessor's parts in cycles.
// warps: of the thread block, that have work.
struct Busy {
  double shared, tensor, issue, warps;
};

// Cycles that the instructions of a warp take one after the other, if `warps` share them.
double in_turn(double issue, double warps) { return kInTurn * issue / warps; }
double in_turn(const Busy& busy) { return in_turn(busy.issue, busy.warps); }

// Multiply-adds a cycle: mma.sync in 16 bits; in tf32 half as many, and an exact product takes four of them.
double tensor_rate(DType dtype, bool exact) { return dtype != DType::kFloat32 ? 1024 : exact ? 128 : 512; }
// Instructions that a product of 16 x 8 sums over 16 in fp32 issues besides itself: for tf32 to round, for exact
// products to split and add up, and six more products.
double conversions(DType dtype, bool exact) { return dtype != DType::kFloat32 ? 0 : exact ? 64 : 6; }

// Instructions of the kernel for columns of so many tiles and the block's filter.
const Issue& issue_of(DType dtype, bool exact, int tiles, int filter) {
  const int arithmetic = dtype == DType::kFloat16 ? 0 : dtype == DType::kBFloat16 ? 1 : exact ? 3 : 2;
  const auto* const variant = std::find(std::begin(kColumnTiles), std::end(kColumnTiles), tiles);
  return kIssue[arithmetic][variant - std::begin(kColumnTiles)][filter];
}
const Issue& issue_of(const BlockShape& s, DType dtype, bool exact, const Columns& columns) {
  const bool fixed = s.kernel == 3 && s.dilation == 1 && s.stride <= 2;
  return issue_of(dtype, exact, columns.tiles, fixed ? static_cast<int>(s.stride) : 0);
}

// Bytes through shared memory at 128 a cycle, products as above, instructions at four a cycle. Two phases, between
// barriers.
struct ChunkCost {
  Busy expand, project;
};

ChunkCost chunk_cost(const BlockShape& s, const DenseShape* stem, DType dtype, bool exact, const Columns& columns,
                     const Tile& t, int64_t warps) {
  const double element = static_cast<double>(element_bytes(dtype)), filter = static_cast<double>(filter_bytes(dtype));
  const double rate = tensor_rate(dtype, exact);
  const double steps = static_cast<double>(groups(s)), pixels = static_cast<double>(t.pixels);
  const Issue& issue = issue_of(s, dtype, exact, columns);
  ChunkCost c{};
  if (s.has_expand) {
    const double products = pixels / static_cast<double>(expand_rows(dtype, columns));
    c.expand.shared = (pixels * (steps * kGroup + kChunk) * element + products * steps * 512 * element) / 128;
    c.expand.tensor = pixels * steps * kGroup * kChunk / rate;
    c.expand.issue = products * (issue.row_block + steps * (stem ? issue.window : issue.step)) / 4;
  } else {
    c.expand.shared = pixels * kChunk * element / 128;
  }
  const int64_t height = rows_of_warp(static_cast<int>(element_bytes(dtype)), columns.tiles);
  const int64_t columns_read = s.stride + s.kernel;
  const int64_t rows_read = s.stride == 1 && s.kernel == 3 ? height + 2 : height * s.kernel;
  const double reads = static_cast<double>(rows_read * columns_read);  // of 16 or 32 bytes, by each lane
  const double taps = static_cast<double>(s.kernel * s.kernel);
  const double w = static_cast<double>(warps), tiles = columns.tiles;
  c.project.shared =
      (w * (reads * 256 * element + taps * 64 * filter + tiles * 256 * element) + static_cast<double>(t.weights)) / 128;
  c.project.tensor = w * tiles * 8 * static_cast<double>(height) * 16 * kChunk / rate;
  c.project.issue = (w * (issue.chunk + taps * issue.tap) + issue.copy) / 4;
  c.expand.warps = std::min(w, pixels / static_cast<double>(expand_rows(dtype, columns)));
  c.project.warps = w;  // also those without a pixel go through it
  return c;
}

// Cycles to issue the loads of a stem's tile, all slices: kLoadRows rows at a time of those that the threads share.
double tile_issue(const DenseShape& s, const WindowTile& t, const Issue& issue, int64_t threads) {
  const int64_t slice = slice_channels(s.c_in, s.kernel), side_by_side = int64_t{1} << row_lanes(t.width * slice);
  const double slices = static_cast<double>(divide_up(s.c_in, slice)), warps = static_cast<double>(threads) / 32;
  const double passes = static_cast<double>(divide_up(t.height, kLoadRows * (threads / side_by_side)));
  const double columns = static_cast<double>(divide_up(divide_up(t.width * slice, 4), side_by_side));
  const double copies = t.shifted > 0 ? 2 : 1;
  return slices * copies * columns * warps * (issue.find + passes * kLoadRows * issue.values) / 4;
}

// Cycles in which a thread block issues all but the chunks: once, and in every round.
struct Around {
  double once, round;
};

Around around(const BlockShape& s, const DenseShape* stem, DType dtype, bool exact, const BlockPlan& p, const Tile& t) {
  const Issue& issue = issue_of(s, dtype, exact, p.columns);
  const double warps = static_cast<double>(p.threads) / 32, pixels = static_cast<double>(t.pixels);
  const double once = (warps * issue.start + pixels / 32 * issue.place) / 4;
  const double all = warps * (issue.round + issue.store + (s.residual ? issue.residual : 0)) / 4;
  if (stem == nullptr) {
    const double vectors = static_cast<double>(divide_up(s.c_in * element_bytes(dtype), 16));
    return {.once = once, .round = all + pixels * vectors / 32 * issue.pixel / 4};
  }
  const int64_t extent = kernel_extent(s.kernel, s.dilation);
  const WindowTile tile = window_tile(*stem, dtype, std::min(s.h, (p.tile_h - 1) * s.stride + extent),
                                      std::min(s.w, (p.tile_w - 1) * s.stride + extent));
  return {.once = once, .round = all + static_cast<double>(p.images) * tile_issue(*stem, tile, issue, p.threads)};
}

// Images that thread blocks begin with, in one round after the other those that follow them.
int64_t groups_of(const BlockShape& s, const BlockPlan& p) { return divide_up(divide_up(s.n, p.images), p.rounds); }

// Cycles to add up the sums of split channels. The blocks of a cluster read those of others, a share each. Otherwise
// the last one reads all from L2, one split after the other.
double join_cycles(DType dtype, const BlockPlan& p) {
  if (p.splits == 1) return 0;
  const int rows = rows_of_warp(static_cast<int>(element_bytes(dtype)), p.columns.tiles);
  const double bytes = static_cast<double>(rows * p.columns.tiles * 16 * p.threads),
               splits = static_cast<double>(p.splits);
  return p.cluster ? kJoinCluster * splits : (splits + 1) * (bytes / 64 + kRead);
}

// Thread blocks that a device has at once. The blocks of a cluster are neighbours in one of the groups that its
// multiprocessors come in. Of the 18 of a group some are switched off, and with them the rest of a cluster's places.
constexpr int64_t kGroupOfProcessors = 16, kOfGroup = 15;
int64_t blocks_at_once(const BlockPlan& p, const Device& device) {
  const int64_t all = device.multiprocessors * p.at_once;
  if (!p.cluster) return all;
  const int64_t groups = std::max<int64_t>(device.multiprocessors / kGroupOfProcessors, 1);
  return std::min(all, groups * std::max<int64_t>(kOfGroup * p.at_once / p.splits, 1) * p.splits);
}

// Instructions of a thread of the stem's own kernel besides those that a block has, too: biases, stores and the like.
constexpr double kStem = 500;

// A map along one axis, and the windows that a convolution reads of it.
struct Axis {
  int64_t size, stride, pad, extent;
};
// Pixels along an axis: of the map, and of the image that a stem makes the map of.
struct Reads {
  int64_t map, image;
};
// The sum of what the tiles of `out` output pixels read, `tile` of them each. inner: the stem's image, or null.
Reads reads_along(const Axis& a, int64_t out, int64_t tile, const Axis* inner) {
  Reads sum{};
  for (int64_t first = 0; first < out; first += tile) {
    const int64_t last = std::min(first + tile, out) - 1;
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

// Of a block, or of a stem and a block in one.
Load load_of(const BlockShape& s, const DenseShape* stem, const BlockPlan& p, DType dtype, bool exact,
             const Device& device) {
  const Tile t = make_tile(s, stem, dtype, p.columns, p.tile_h, p.tile_w, p.images, p.buffers, p.ahead);
  const ChunkCost cost = chunk_cost(s, stem, dtype, exact, p.columns, t, p.threads / 32);
  const double processors = static_cast<double>(device.multiprocessors), blocks = static_cast<double>(p.blocks);
  const int64_t chunks = divide_up(s.c_hidden, kChunk), extent = kernel_extent(s.kernel, s.dilation);
  const double rounds = static_cast<double>(divide_up(s.n, p.images)) / static_cast<double>(groups_of(s, p)) * blocks;
  const double all = rounds / static_cast<double>(p.splits) / processors * static_cast<double>(chunks);
  const Around beside = around(s, stem, dtype, exact, p, t);
  Load l{};
  l.shared = all * (cost.expand.shared + cost.project.shared);
  l.tensor = all * (cost.expand.tensor + cost.project.tensor);
  l.issue =
      all * (cost.expand.issue + cost.project.issue) + (blocks * beside.once + rounds * beside.round) / processors;
  l.cycles = p.cycles;
  const Axis rows{.size = s.h, .stride = s.stride, .pad = s.pad.top, .extent = extent};
  const Axis columns{.size = s.w, .stride = s.stride, .pad = s.pad.left, .extent = extent};
  const int64_t element = element_bytes(dtype);
  int64_t bytes = block_layout(s, dtype).size + s.n * h_out(s) * w_out(s) * s.c_out * element;
  if (stem) {
    const Axis image_rows{.size = stem->h, .stride = stem->stride, .pad = stem->pad.top, .extent = stem->kernel};
    const Axis image_columns{.size = stem->w, .stride = stem->stride, .pad = stem->pad.left, .extent = stem->kernel};
    bytes += s.n * reads_along(rows, h_out(s), p.tile_h, &image_rows).image *
             reads_along(columns, w_out(s), p.tile_w, &image_columns).image * stem->c_in * element;
  } else {
    bytes += s.n * reads_along(rows, h_out(s), p.tile_h, nullptr).map *
             reads_along(columns, w_out(s), p.tile_w, nullptr).map * s.c_in * element;
  }
  l.bytes = static_cast<double>(bytes);
  l.cycles = std::max({l.cycles, l.shared, l.tensor, l.issue});
  return l;
}

// Sets the cycles of a launch of the network's ends. Their threads have up to 128 registers. Every thread block reads
// memory `reads` times, one read after the other.
void predict_end(Load& l, const Grid& grid, double reads, const Device& device) {
  const int64_t by_shared = std::max<int64_t>(device.shared_all / (grid.shared + 1024), 1);
  const int64_t at_once = std::min<int64_t>(2048 / 4 / grid.threads, by_shared);
  const double waves = static_cast<double>(divide_up(grid.x * grid.y, device.multiprocessors * at_once));
  l.cycles = std::max({l.shared, l.tensor, l.issue, waves * reads * kRead}) + kStart;
}

}  // namespace

void choose_rounds(const BlockShape& s, const DenseShape* stem, DType dtype, const Tile& t, const Device& device,
                   int64_t fixed, BlockPlan& p) {
  const ChunkCost cost = chunk_cost(s, stem, dtype, false, p.columns, t, p.threads / 32);
  const Busy together{.shared = cost.expand.shared + cost.project.shared,
                      .tensor = cost.expand.tensor + cost.project.tensor,
                      .issue = cost.expand.issue + cost.project.issue,
                      .warps = std::max(cost.expand.warps, cost.project.warps)};
  const double turns = p.ahead ? in_turn(together) : in_turn(cost.expand) + in_turn(cost.project);
  const double wait = p.ahead ? kWait / 2 : kWait;  // one barrier of two
  const double steps = static_cast<double>(divide_up(divide_up(s.c_hidden, kChunk), p.splits) + (p.ahead ? 1 : 0));
  const double reload = p.buffers == 1 && steps > 1 ? static_cast<double>(t.weights) / kBytes : 0;
  const double input = static_cast<double>(stem ? t.x : t.pixels * s.c_in * element_bytes(dtype));
  const Around beside = around(s, stem, dtype, false, p, t);
  const double warps = static_cast<double>(p.threads) / 32;
  const int64_t groups = divide_up(s.n, p.images), of_group = p.blocks / groups;
  const auto at_once = static_cast<double>(blocks_at_once(p, device));
  const auto cycles = [&](int64_t rounds) {
    const auto blocks = static_cast<double>(of_group * divide_up(groups, rounds));
    const double waves = std::ceil(blocks / at_once);
    // Side by side on a multiprocessor, if all waves have the same share.
    const double filled = std::min(static_cast<double>(p.at_once),
                                   std::ceil(blocks / waves / static_cast<double>(device.multiprocessors)));
    const double shared = (kSharedOfAll * filled + kSharedAlone) * together.shared;
    const double step = std::max(shared + turns + wait, filled * std::max(together.tensor, together.issue));
    const double round = steps * (step + reload) + (filled + 1) * input / kBytes + in_turn(beside.round, warps);
    return waves * (in_turn(beside.once, warps) + static_cast<double>(rounds) * round + join_cycles(dtype, p)) +
           kLaunch;
  };
  p.rounds = std::max<int64_t>(fixed, 1), p.cycles = cycles(p.rounds);
  const bool again = fixed == 0 && takes_rounds(dtype, p.columns, p.images, p.splits);
  for (int64_t rounds = 2; again && rounds <= std::min(groups, kMostRounds); ++rounds) {
    const double predicted = cycles(rounds);
    if (predicted < p.cycles) p.rounds = rounds, p.cycles = predicted;
  }
  p.blocks = of_group * divide_up(groups, p.rounds);
}

Load block_load(const BlockShape& s, const BlockPlan& plan, DType dtype, bool exact, const Device& device) {
  return load_of(s, nullptr, plan, dtype, exact, device);
}

Load joined_load(const DenseShape& stem, const BlockShape& s, const BlockPlan& plan, DType dtype, bool exact,
                 const Device& device) {
  return load_of(s, &stem, plan, dtype, exact, device);
}

Load stem_load(const DenseShape& s, DType dtype, bool exact, const Device& device) {
  const StemArgs a = stem_args(s, dense_images(s, nullptr), dtype, device);
  const Grid grid = stem_grid(a);
  const WindowTile tile = window_tile(s, dtype, a.tile_h, a.tile_w);
  const double processors = static_cast<double>(device.multiprocessors), element = element_bytes(dtype);
  const double blocks = static_cast<double>(grid.x * grid.y) / processors, rows = blocks * kStemPixels;
  const double values = static_cast<double>(window_values(s)), steps = values / kGroup;
  const double slices = static_cast<double>(divide_up(s.c_in, int64_t{a.window.slice}));
  Load l{};
  l.shared = (rows * values * element + blocks * slices * static_cast<double>(tile.image)) / 128;
  l.tensor = rows * values * kChunk / tensor_rate(dtype, exact);
  // Its windows and products are those of a block.
  const Issue& issue = issue_of(dtype, exact, kColumnTiles[0], 0);
  const double products = rows / expanded_at_once(static_cast<int>(element_bytes(dtype)), kColumnTiles[0]);
  l.issue =
      blocks * tile_issue(s, tile, issue, kStemThreads) + (products * steps * issue.window + rows / 32 * kStem) / 4;
  l.bytes = static_cast<double>(s.n * s.c_in * s.h * s.w + s.n * h_out(s) * w_out(s) * s.c_out) * element +
            static_cast<double>(dense_size(s, dtype));
  predict_end(l, grid, slices + steps, device);
  return l;
}

Load pool_load(const HeadShape& s, DType dtype, bool exact, const Device& device) {
  const PoolArgs a = pool_args(s, dtype, device);
  const Grid grid = pool_grid(a);
  const double processors = static_cast<double>(device.multiprocessors), element = element_bytes(dtype);
  const double rounds = static_cast<double>(divide_up(a.pixels, kPoolPixels)), steps = a.groups;
  const double warps = kPoolThreads / 32;
  const double all = static_cast<double>(s.n * divide_up(a.c_last, kPoolThreads)) * rounds / processors;
  const double row = static_cast<double>(row_pitch(s.c_in, dtype));
  Load l{};
  // Every warp reads all rows; weights come from the L1 cache, which is the same memory.
  l.shared = all * (kPoolPixels * row * (1 + warps) + warps * steps * 512 * element) / 128;
  l.tensor = all * kPoolPixels * steps * kGroup * kPoolThreads / tensor_rate(dtype, exact);
  l.issue = all *
            (warps * (steps * (16 * 2 + 12 + 16 * conversions(dtype, exact)) + 300) +
             kPoolPixels * steps * element * issue_of(dtype, exact, kColumnTiles[0], 0).pixel / 32) /
            4;
  l.bytes = static_cast<double>(s.n * a.pixels * s.c_in + s.n * pooled_row(s)) * element +
            static_cast<double>(matrix_size(s.c_in, s.c_last, dtype));
  // Weights are there if the warps work together, otherwise each step reads them.
  predict_end(l, grid, rounds * (a.images + (a.together ? 0 : steps)), device);
  return l;
}

Load classify_load(const HeadShape& s, DType dtype, const Device& device) {
  const ClassifyArgs a = classify_args(s, dtype, device);
  const Grid grid = classify_grid(a);
  const double blocks = static_cast<double>(grid.x * grid.y) / static_cast<double>(device.multiprocessors);
  const double element = element_bytes(dtype), steps = a.groups, warps = kClassifyWarps;
  Load l{};
  l.shared =
      blocks * (steps * (512 + kClassifyImages * kGroup) * element + 2 * warps * kClassifyImages * kChunk * 4) / 128;
  l.tensor = blocks * kClassifyImages * steps * kGroup * kChunk / tensor_rate(dtype, true);
  l.issue = blocks * (steps * (4 * 2 + 8 + 4 * conversions(dtype, true)) + warps * 300) / 4;
  l.bytes = static_cast<double>(s.n * (pooled_row(s) + s.classes)) * element +
            static_cast<double>(matrix_size(s.c_last, s.classes, dtype));
  predict_end(l, grid, static_cast<double>(divide_up(divide_up(a.groups, kClassifyWarps), a.at_once)), device);
  return l;
}

}  // namespace cuda
}  // namespace mnv2
