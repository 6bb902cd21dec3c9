// How a block is cut into tiles on a GPU. Host code, torch-free and CUDA-free: a plan can be made and looked at on any
// machine.
#pragma once

#include <array>
#include <string>

#include "../network.h"
#include "layout.h"

namespace mnv2 {
namespace cuda {

// The properties of a GPU that plans depend on.
struct Device {
  int64_t multiprocessors;
  int64_t shared_block;   // bytes of shared memory that a thread block can have
  int64_t shared_all;     // and all of a multiprocessor's together, 1 KiB more each
  int64_t cluster;        // most thread blocks of a cluster; 1: it has none
  bool dependent_launch;  // programmatic dependent launch

  bool operator==(const Device&) const = default;
};

// The device that "sm_80", "sm_86" or "sm_90" stands for (A100, A10, H200); throws std::invalid_argument for other
// names.
Device known_device(const std::string& name);

struct BlockPlan {
  int64_t tile_h, tile_w, images;  // output pixels and images that a thread block computes at a time
  int64_t rounds;                  // one after the other
  int64_t threads;
  int64_t splits;   // of the hidden channels
  int64_t buffers;  // chunks of them whose weights a thread block holds: 2, one of them on its way, or 1
  bool ahead;       // a chunk is expanded while the one before is filtered; takes two expanded tiles
  Columns columns;
  int64_t blocks;            // thread blocks, all parts and splits
  int64_t at_once;           // on a multiprocessor
  int64_t shared;            // bytes of a thread block
  int64_t partial, tickets;  // floats of partial sums, numbers of tickets
  bool cluster;              // the splits of a tile are one, and add up without `partial`
  double cycles;             // predicted, of the whole launch
  bool fits;                 // false: no tile fits, all else is zero
};

// stem: of which the block is joined(), or null.
BlockPlan plan_block(const BlockShape& shape, DType dtype, const Device& device, const DenseShape* stem = nullptr);
// With these tiles, at most 32 x 32 pixels, and splits that all have hidden channels; several images only if a tile is
// a whole one. rounds: 0 is the quickest number; more than one only of one image each, without splits.
BlockPlan plan_tile(const BlockShape& shape, DType dtype, const Device& device, int64_t tile_h, int64_t tile_w,
                    int64_t images, int64_t splits, int64_t buffers, bool ahead, const DenseShape* stem = nullptr,
                    int64_t rounds = 0);

// Rows, columns and images of a tile, splits, whether chunks are expanded ahead, and rounds or 0.
using ChosenTile = std::array<int64_t, 6>;
// The plan with this tile, which may not fit; throws std::invalid_argument if plan_tile() has no such tile.
BlockPlan plan_chosen(const BlockShape& shape, DType dtype, const Device& device, const ChosenTile& tile);

// Why a unit, or one of a network, cannot run on a device whose thread blocks can have so many bytes of shared memory;
// empty: it can. The shapes break no rule.
std::string unfit(const BlockShape& shape, DType dtype, int64_t shared_block);
std::string unfit(const DenseShape& shape, DType dtype);
std::string unfit(const HeadShape& shape);
std::string unfit(const NetworkShape& shape, DType dtype, int64_t shared_block);

// The block that a stem and a first block without expansion are together: the stem is its expansion, over windows. A
// stem with several slices of channels has no plan for that.
BlockShape joined(const DenseShape& stem, const BlockShape& block);

}  // namespace cuda
}  // namespace mnv2
