#include "plan.h"

#include <stdexcept>

#include "cost.h"
#include "tiles.h"

namespace mnv2 {
namespace cuda {
namespace {

// Of a tile, if the map has so many and they fit. The costs are not known to hold below.
constexpr int64_t kLeastPixels = 16;

constexpr const char* kTooLarge = "it has too many pixels or channels for the GPU's 32-bit counters";

}  // namespace

Device known_device(const std::string& name) {
  const auto device = [](int64_t multiprocessors, int64_t shared_kib, bool dependent_launch) {
    return Device{.multiprocessors = multiprocessors,
                  .shared_block = (shared_kib - 1) << 10,
                  .shared_all = shared_kib << 10,
                  .cluster = dependent_launch ? kMostCluster : 1,
                  .dependent_launch = dependent_launch};
  };
  if (name == "sm_80") return device(108, 164, false);
  if (name == "sm_86") return device(72, 100, false);
  if (name == "sm_90") return device(132, 228, true);
  throw std::invalid_argument("plan: device must be sm_80, sm_86 or sm_90, got " + name);
}

BlockPlan plan_tile(const BlockShape& s, DType dtype, const Device& device, int64_t tile_h, int64_t tile_w,
                    int64_t images, int64_t splits, int64_t buffers, bool ahead, const DenseShape* stem,
                    int64_t rounds) {
  if (stem && slice_channels(stem->c_in, stem->kernel) < stem->c_in) return {};
  const Columns columns = columns_of(s.c_out);
  if (rounds > 1 && !takes_rounds(dtype, columns, images, splits)) return {};
  if (divide_up(divide_up(s.c_hidden, kChunk), splits) == 1) buffers = 1;
  if (buffers == 1 || !s.has_expand || stem) ahead = false;
  const Tile t = make_tile(s, stem, dtype, columns, tile_h, tile_w, images, buffers, ahead);
  const int64_t tiles_of_image = divide_up(h_out(s), tile_h) * divide_up(w_out(s), tile_w);
  const int64_t warps = std::max<int64_t>(divide_up(t.patches, 8), 4);
  const int64_t threads_at_once = threads_of(dtype, columns, device);
  const int64_t sums = rows_of_warp(static_cast<int>(element_bytes(dtype)), columns.tiles) * columns.tiles * 4;
  const bool cluster = splits > 1 && device.cluster > 1;
  const int64_t shared = cluster ? std::max(t.shared, t.weights_at + sums * 32 * warps * 4) : t.shared;
  if (32 * warps > threads_at_once || shared > device.shared_block || (cluster && splits > device.cluster) ||
      !blocks_fit(tiles_of_image, divide_up(s.n, images)))
    return {};
  const int64_t tiles = tiles_of_image * divide_up(s.n, images);
  const int64_t blocks = tiles * columns.parts * splits;
  const int64_t at_once = std::min(threads_at_once / (32 * warps), device.shared_all / (shared + 1024));
  BlockPlan plan{.tile_h = tile_h,
                 .tile_w = tile_w,
                 .images = images,
                 .rounds = 1,
                 .threads = 32 * warps,
                 .splits = splits,
                 .buffers = buffers,
                 .ahead = ahead,
                 .columns = columns,
                 .blocks = blocks,
                 .at_once = at_once,
                 .shared = shared,
                 .partial = splits > 1 && !cluster ? blocks * sums * 32 * warps : 0,
                 .tickets = splits > 1 && !cluster ? tiles * columns.parts : 0,
                 .cluster = cluster,
                 .cycles = 0,
                 .fits = true};
  choose_rounds(s, stem, dtype, t, device, rounds, plan);
  return plan;
}

namespace {

// The quickest of all tiles and splits.
BlockPlan best_plan(const BlockShape& s, const DenseShape* stem, DType dtype, const Device& device, int64_t buffers) {
  BlockPlan best{};
  bool best_small = false;
  const int64_t chunks = divide_up(s.c_hidden, kChunk), height = h_out(s), width = w_out(s);
  const int64_t most = threads_of(dtype, columns_of(s.c_out), device);
  for (int64_t tile_h = 1; tile_h <= std::min(height, kMostTile); ++tile_h) {
    for (int64_t tile_w = 1; tile_w <= std::min(width, kMostTile); ++tile_w) {
      if (divide_up(tile_h, 4) * divide_up(tile_w, 2) * 2 > most / 4) break;  // of the larger patches
      const bool whole = tile_h == height && tile_w == width;
      const bool small = tile_h * tile_w < kLeastPixels && !whole;
      if (small && best.fits && !best_small) continue;
      for (int64_t images = 1; images <= (whole ? std::min<int64_t>(s.n, 16) : 1); ++images) {
        for (int64_t splits = 1; splits <= std::min<int64_t>(chunks, 32); splits *= 2) {
          const auto plan_with = [&](bool ahead) {
            return plan_tile(s, dtype, device, tile_h, tile_w, images, splits, buffers, ahead, stem);
          };
          const BlockPlan plan = plan_with(false);
          if (plan.fits && splits > 1 && plan.blocks > 2 * device.multiprocessors) break;
          if (!plan.fits) continue;
          if (!best.fits || (best_small && !small) || plan.cycles < best.cycles) best = plan, best_small = small;
          if (plan.buffers == 1 || !s.has_expand) continue;
          const BlockPlan ahead = plan_with(true);
          if (ahead.fits && ahead.cycles < best.cycles) best = ahead, best_small = small;
        }
      }
    }
  }
  return best;
}

}  // namespace

BlockPlan plan_block(const BlockShape& s, DType dtype, const Device& device, const DenseShape* stem) {
  if (s.n == 0) return {};
  const BlockPlan plan = best_plan(s, stem, dtype, device, 2);
  return plan.fits ? plan : best_plan(s, stem, dtype, device, 1);
}

BlockPlan plan_chosen(const BlockShape& s, DType dtype, const Device& device, const ChosenTile& tile) {
  const auto& [rows, columns, images, splits, ahead, rounds] = tile;
  const int64_t chunks = divide_up(s.c_hidden, kChunk);
  const bool whole = rows >= h_out(s) && columns >= w_out(s);
  if (rows < 1 || rows > kMostTile || columns < 1 || columns > kMostTile || images < 1 || (images > 1 && !whole) ||
      splits < 1 || splits > chunks)
    throw std::invalid_argument("plan: tile must have 1 to 32 rows and columns, several images only if it is a whole " +
                                ("one, and 1 to " + std::to_string(chunks)) + " splits");
  if (rounds < 0 || rounds > kMostRounds || (rounds > 1 && !takes_rounds(dtype, columns_of(s.c_out), images, splits))) {
    throw std::invalid_argument("plan: tile must have 0 to " + std::to_string(kMostRounds) +
                                " rounds, and several only with one image, one split and not 65 to 96 output channels");
  }
  return plan_tile(s, dtype, device, rows, columns, images, splits, 2, ahead != 0, nullptr, rounds);
}

std::string unfit(const BlockShape& s, DType dtype, int64_t shared_block) {
  const Tile least = make_tile(s, nullptr, dtype, columns_of(s.c_out), 1, 1, 1, 1, false);
  if (least.shared > shared_block)
    return "it needs " + std::to_string(least.shared) + " bytes of shared memory, and a thread block can have " +
           std::to_string(shared_block);
  if (blocks_fit(h_out(s) * w_out(s), s.n)) return "";
  const Device device{.multiprocessors = 1,
                      .shared_block = shared_block,
                      .shared_all = shared_block + 1024,
                      .cluster = 1,
                      .dependent_launch = false};
  return plan_block(s, dtype, device).fits ? "" : kTooLarge;
}

std::string unfit(const DenseShape& s, DType dtype) {
  constexpr int64_t kLeastShared = int64_t{99} << 10;  // of all devices; more makes no more thread blocks
  if (h_out(s) * w_out(s) >= kTooMany || matrix_chunk(window_values(s), dtype) >= kTooMany) return kTooLarge;
  const StemTile tile = stem_tile(s, dtype, kLeastShared);
  const bool fits = blocks_fit(divide_up(h_out(s), tile.height) * divide_up(w_out(s), tile.width), s.n);
  return fits ? "" : kTooLarge;
}

std::string unfit(const HeadShape& s) { return blocks_fit(1, divide_up(s.n, kMostPoolImages)) ? "" : kTooLarge; }

std::string unfit(const NetworkShape& s, DType dtype, int64_t shared_block) {
  for (int64_t i = 0; i < static_cast<int64_t>(s.units.size()); ++i) {
    const NetworkUnit& unit = s.units[static_cast<size_t>(i)];
    const std::string why = unit.kind == UnitKind::kDense   ? unfit(unit.dense, dtype)
                            : unit.kind == UnitKind::kBlock ? unfit(unit.block, dtype, shared_block)
                                                            : unfit(unit.head);
    if (!why.empty()) return name_of(s, i) + ": " + why;
  }
  return "";
}

BlockShape joined(const DenseShape& stem, const BlockShape& block) {
  BlockShape s = block;
  s.has_expand = true;
  s.c_in = window_values(stem);
  return s;
}

}  // namespace cuda
}  // namespace mnv2
