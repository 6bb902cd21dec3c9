// The whole network as one piece of work, and how it is cut up on a CPU. Torch-free.
#pragma once

#include <string>
#include <vector>

#include "plan.h"

namespace mnv2 {

// Every unit takes what the one before it gives.
struct NetworkShape {
  StemShape stem;
  std::vector<BlockShape> blocks;
  HeadShape head;
};

// What the operator `network` takes besides x and the packed weights: see csrc/ops.cpp.
struct NetworkArguments {
  const std::vector<int64_t>&stem, &blocks, &head;
  const std::vector<double>& bounds;
};

// The network on n images of h x w x c; `rule` gets the rule that the arguments break, with the unit that breaks it.
NetworkShape network_shape(int64_t n, int64_t h, int64_t w, int64_t c, const NetworkArguments& arguments,
                           std::string* rule);

// Floats of the packed weights of all units, one after the other.
int64_t network_size(const NetworkShape& shape, Lanes lanes);

// A step makes one map out of another: the stem, a block, or stem and first block in one.
struct Step {
  const StemShape* stem;    // null: the step reads the map before it
  const BlockShape* block;  // null: the stem alone
};

// Elements of the step's output for one image.
int64_t map_size(const Step& step);
// Floats of packed weights; 0 where the step has no stem or no block.
int64_t stem_weights(const Step& step, Lanes lanes);
int64_t block_weights(const Step& step, Lanes lanes);

struct NetworkPlan {
  std::vector<Step> steps;  // point into the NetworkShape
  // Of a large batch `slice` images at a time go through the first `large` steps, whose maps are large: these maps stay
  // in the caches, and only a few of them ever exist. The other steps take the whole batch.
  int64_t slice, large;
  // Floats. Maps lie in two pairs of buffers that take turns, one pair for slices and one for the whole batch.
  int64_t maps[2][2];
  int64_t shared;  // partial sums and pooled pixels
  int64_t arena;   // all of it
};

NetworkPlan plan_network(const NetworkShape& shape, DType dtype, const Machine& machine);

// The shapes of a step for n images instead of its own batch.
template <class Shape>
Shape with_batch(Shape shape, int64_t n) {
  shape.n = n;
  return shape;
}

}  // namespace mnv2
