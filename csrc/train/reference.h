// The passes in float64 on the host, in the plainest way: the specification of the interface. The operators use it for
// float64 inputs, so that their formulas can be checked against finite differences.
#pragma once

#include <memory>

#include "passes.h"

namespace mnv2::train {

std::unique_ptr<Passes> reference_passes();

}  // namespace mnv2::train
