// The whole network as one description. Torch-free.
#pragma once

#include <string>
#include <vector>

#include "api.h"
#include "block.h"

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
MNV2_FUSED_API NetworkShape network_shape(int64_t n, int64_t h, int64_t w, int64_t c, const NetworkArguments& arguments,
                                          std::string* rule);

}  // namespace mnv2
