// Everything here is compiled for one ISA: no standard containers, no torch, anonymous namespaces throughout, so that
// the linker can never put a function of this file in place of a portable one.
#include "vec_avx512.h"  // first: the others are written over its Vec

#include "block-inl.h"
#include "head-inl.h"
#include "peak-inl.h"
#include "train-inl.h"

namespace mnv2 {

extern const KernelTable kAvx512Kernels = {
    "avx512",
    kLanes,
    &block,
    &reduce,
    &stem,
    &pool,
    &classify,
    &moments,
    &linear_moments,
    &product,
    &map_moments,
    &map_products,
    &map_combine,
    &input_backward,
    &hidden,
    &project,
    &project_backward,
    &hidden_backward,
    &multiply_add,
    kChains* Vec::kLanes,
};

}  // namespace mnv2
