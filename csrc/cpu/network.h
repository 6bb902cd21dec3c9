// How a network is cut into steps on a CPU. Torch-free.
#pragma once

#include <vector>

#include "../network.h"
#include "plan.h"

namespace mnv2 {

// Floats of the packed weights of all units, one after the other.
int64_t network_size(const NetworkShape& shape, Lanes lanes);

// A step computes one map from another: a unit, or stem and first block in one. A launch is a step on some of the
// images. Shapes carry the number of those images.
struct Launch {
  bool has_dense, has_block, has_head;
  DenseShape dense;
  BlockShape block;
  HeadShape head;
  BlockPlan plan;
  int64_t first;                   // image
  int64_t dense_weights, weights;  // bytes from the start of the packed weights: of `dense`; of the others
  int64_t source;                  // the step whose map it reads, or kImages
  MapPlace in, out;                // `in` is unused if it reads the images
};

struct NetworkPlan {
  std::vector<Launch> launches;
  int64_t shared;  // bytes from the arena's start: partial sums and pooled pixels
  int64_t arena;   // floats
  bool fused_stem;
  // A large batch goes through the first `large` steps `slice` images at a time. The maps of these steps are large:
  // this way they stay in the caches, and only a few of them ever exist. The other steps take the whole batch.
  int64_t steps, slice, large;
};

NetworkPlan plan_network(const NetworkShape& shape, DType dtype, const Machine& machine);

}  // namespace mnv2
