// The kernels of the ISA in use. Chosen once: the best ISA of the machine, or the one that MNV2_FUSED_CPU_ISA names.
#pragma once

#include <vector>

#include "kernels/table.h"

namespace mnv2 {

// Throws std::runtime_error if MNV2_FUSED_CPU_ISA is not one of supported_kernels().
const KernelTable& kernels();

// All that this build and this machine support, the simplest ISA first.
std::vector<const KernelTable*> supported_kernels();

// The kernels' vectors and the machine's caches, for the planner.
Machine machine(int64_t threads);

// Sizes in bytes that machine() tells instead of the caches' own, from the next call on; 0 for their own. For tests.
void pretend_caches(int64_t l1, int64_t l2);

}  // namespace mnv2
