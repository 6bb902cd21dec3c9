// The whole network as one description. Torch-free.
#pragma once

#include <string>
#include <vector>

#include "api.h"
#include "shapes.h"

namespace mnv2 {

// Every unit takes what the one before it gives.
struct NetworkShape {
  DenseShape stem;
  std::vector<BlockShape> blocks;
  HeadShape head;
};

// What the operator `network` takes besides x and the packed weights: see csrc/schemas.cpp.
struct NetworkArguments {
  std::vector<int64_t> stem, blocks, head;
  std::vector<double> bounds;

  bool operator==(const NetworkArguments&) const = default;
};

// The network on images of size x; `rule` gets the rule that the arguments break, with the unit that breaks it.
MNV2_FUSED_API NetworkShape network_from(const ImageSize& x, const NetworkArguments& arguments, std::string* rule);

}  // namespace mnv2
