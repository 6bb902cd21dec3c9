// How a block is cut into tiles on a GPU, and what each kernel is given for it. Host code, torch-free and CUDA-free: a
// plan can be made and looked at on any machine.
#pragma once

#include <string>

#include "../network.h"
#include "args.h"
#include "layout.h"

namespace mnv2 {
namespace cuda {

// What plans depend on.
struct Device {
  int64_t multiprocessors;
  int64_t shared_block;   // bytes of shared memory that a thread block can have
  int64_t shared_all;     // and all of a multiprocessor's together, 1 KiB more each
  bool dependent_launch;  // programmatic dependent launch

  bool operator==(const Device&) const = default;
};

// The device that "sm_80", "sm_86" or "sm_90" stands for (A100, A10, H200); throws std::invalid_argument for other
// names.
Device known_device(const std::string& name);

struct BlockPlan {
  int64_t tile_h, tile_w, images;  // output pixels and images of a thread block
  int64_t threads;
  int64_t splits;   // of the hidden channels
  int64_t buffers;  // chunks of them whose weights a thread block holds: 2, one of which is on its way, or 1
  Columns columns;
  int64_t blocks;            // thread blocks, all parts and splits
  int64_t at_once;           // on a multiprocessor
  int64_t shared;            // bytes of a thread block
  int64_t partial, tickets;  // floats of partial sums, numbers of tickets
  double cycles;             // predicted, of the whole launch
  bool fits;                 // false: no tile fits, all else is zero
};

BlockPlan plan_block(const BlockShape& shape, DType dtype, const Device& device);
// With these tiles, at most 32 x 32 pixels, and splits of which each has hidden channels; several images only where a
// tile is a whole one.
BlockPlan plan_tile(const BlockShape& shape, DType dtype, const Device& device, int64_t tile_h, int64_t tile_w,
                    int64_t images, int64_t splits, int64_t buffers);

// Why a unit, or one of a network, cannot run on a device whose thread blocks can have so many bytes of shared memory;
// empty: it can. The shapes break no rule.
std::string unfit(const BlockShape& shape, DType dtype, int64_t shared_block);
std::string unfit(const DenseShape& shape, DType dtype);
std::string unfit(const HeadShape& shape);
std::string unfit(const NetworkShape& shape, DType dtype, int64_t shared_block);

// All but the pointers and the window.
BlockArgs block_args(const BlockShape& shape, const BlockPlan& plan, DType dtype);

// What a launch needs besides its kernel and arguments.
struct Grid {
  int64_t x, y, z;
  int64_t threads, shared;  // of a thread block; bytes
};
Grid block_grid(const BlockPlan& plan, const BlockArgs& args);

// What a launch asks of a device: cycles in which it keeps each part of the multiprocessors busy if all share the work
// evenly, bytes that cross the device's memory (weights once, halos as often as they are read), and the cycles that are
// predicted for the launch as it is. `exact`: float32 in products of two tf32 parts.
struct Load {
  double shared, tensor, issue;
  double bytes;
  double cycles;
};
Load block_load(const BlockShape& shape, const BlockPlan& plan, DType dtype, bool exact, const Device& device);

StemArgs stem_args(const DenseShape& shape, DType dtype, const Device& device);
Grid stem_grid(const StemArgs& args);
Load stem_load(const DenseShape& shape, DType dtype, bool exact, const Device& device);

// The head's two kernels; what is pooled lies between them, (n, pooled_row).
int64_t pooled_row(const HeadShape& shape);
PoolArgs pool_args(const HeadShape& shape, DType dtype, const Device& device);
Grid pool_grid(const PoolArgs& args);
ClassifyArgs classify_args(const HeadShape& shape, DType dtype);
Grid classify_grid(const ClassifyArgs& args);
Load pool_load(const HeadShape& shape, DType dtype, bool exact, const Device& device);
Load classify_load(const HeadShape& shape, DType dtype, const Device& device);

// All but the pointers. Elements of `packed` are made by a thread each.
PackArgs block_pack_args(int64_t c_in, int64_t c_hidden, int64_t c_out, int64_t kernel, DType dtype);
PackArgs matrix_pack_args(int64_t channels, int64_t taps, int64_t columns, DType dtype);
Grid pack_grid(const PackArgs& args);

// The block that a stem and a first block without expansion are together: the stem is its expansion, over windows.
bool joins(const DenseShape& stem, const BlockShape& block);
BlockShape joined(const DenseShape& stem, const BlockShape& block);
Load joined_load(const DenseShape& stem, const BlockShape& joined, const BlockPlan& plan, DType dtype, bool exact,
                 const Device& device);
BlockArgs joined_args(const DenseShape& stem, const BlockShape& joined, const BlockPlan& plan, DType dtype);

}  // namespace cuda
}  // namespace mnv2
