// How the whole network is cut into steps on a CPU. Torch-free.
#pragma once

#include <vector>

#include "../network.h"
#include "plan.h"

namespace mnv2 {

// Floats of the packed weights of all units, one after the other.
int64_t network_size(const NetworkShape& shape, Lanes lanes);

// A step computes one map from another: the stem, a block, or stem and first block in one. A launch is a step on some
// of the images. Shapes carry the number of those images; offsets are in bytes.
struct Launch {
  bool has_stem, has_block;
  DenseShape stem;
  BlockShape block;
  BlockPlan plan;
  int64_t first;                        // image
  int64_t stem_weights, block_weights;  // from the start of the packed weights
  int64_t in, out;                      // maps, from the start of the arena; a stem reads the images instead
};

struct NetworkPlan {
  std::vector<Launch> launches;
  int64_t head_weights;  // as a launch's
  int64_t head_in;
  int64_t shared;  // partial sums and pooled pixels, from the start of the arena
  int64_t arena;   // floats
  bool fused_stem;
  // A large batch goes through the first `large` steps `slice` images at a time. The maps of these steps are large:
  // this way they stay in the caches, and only a few of them ever exist. The other steps take the whole batch.
  int64_t steps, slice, large;
};

NetworkPlan plan_network(const NetworkShape& shape, DType dtype, const Machine& machine);

}  // namespace mnv2
