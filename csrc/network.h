// The shape of a whole network. Torch-free.
#pragma once

#include <string>
#include <vector>

#include "api.h"
#include "shapes.h"

namespace mnv2 {

// Each unit's input is the output of the unit before it.
struct NetworkShape {
  DenseShape stem;
  std::vector<BlockShape> blocks;
  HeadShape head;
};

// The arguments of the operator `network` besides x and the packed weights; see csrc/schemas.cpp.
struct NetworkArguments {
  std::vector<int64_t> stem, blocks, head;
  std::vector<double> bounds;

  bool operator==(const NetworkArguments&) const = default;
};

// The network on images of size x. If the arguments break a rule, `rule` names it and the unit; else it stays empty.
MNV2_FUSED_API NetworkShape network_from(const ImageSize& x, const NetworkArguments& arguments, std::string* rule);

}  // namespace mnv2
