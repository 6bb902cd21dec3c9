// What launches ask of a device, and the cycles that are predicted for them.
#pragma once

#include "plan.h"

namespace mnv2 {
namespace cuda {

// Cycles in which a launch keeps each part of the multiprocessors busy if all share the work evenly; bytes that cross
// the device's memory (weights once, halos as often as they are read); and the cycles that are predicted for the launch
// as it is. `exact`: float32 in products of two tf32 parts.
struct Load {
  double shared, tensor, issue;
  double bytes;
  double cycles;
};

Load block_load(const BlockShape& shape, const BlockPlan& plan, DType dtype, bool exact, const Device& device);
// Of stem and block in one, see joined().
Load joined_load(const DenseShape& stem, const BlockShape& joined, const BlockPlan& plan, DType dtype, bool exact,
                 const Device& device);
Load stem_load(const DenseShape& shape, DType dtype, bool exact, const Device& device);
// The head's two kernels.
Load pool_load(const HeadShape& shape, DType dtype, bool exact, const Device& device);
Load classify_load(const HeadShape& shape, DType dtype, const Device& device);

// Sets the rounds of a plan, the thread blocks that follow from them, and its cycles; all else is there, and `blocks`
// are those of one round. rounds: see plan_tile().
struct Tile;
void choose_rounds(const BlockShape& shape, const DenseShape* stem, DType dtype, const Tile& tile, const Device& device,
                   int64_t rounds, BlockPlan& plan);

}  // namespace cuda
}  // namespace mnv2
