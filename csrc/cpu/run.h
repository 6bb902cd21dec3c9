// Turns fused units and networks into stages. Torch-free; x and y are dense NHWC unless said otherwise.
// `packed` weights are those of the kernels' family, see layout.h.
#pragma once

#include "kernels/table.h"
#include "network.h"
#include "stages.h"

namespace mnv2 {

void run_block(const KernelTable& kernels, const Machine& machine, const BlockShape& shape, DType dtype, const void* x,
               const void* packed, void* y, const ParallelFor& parallel);

// `image_bias`: replaces the packed bias, a vector for each image; see image_bias_row(). Null: the packed bias.
void run_stem(const KernelTable& kernels, const Machine& machine, const DenseShape& shape, DType dtype, const Images& x,
              const void* packed, const float* image_bias, void* y, const ParallelFor& parallel);

// Floats from one image's vector of biases to the next: c_out rounded up to whole vectors of any ISA. The floats beyond
// c_out are read, but do not count.
static inline int64_t image_bias_row(const DenseShape& s) { return round_up(s.c_out, kAlign); }

// y (n, classes)
void run_head(const KernelTable& kernels, const Machine& machine, const HeadShape& shape, DType dtype, const void* x,
              const void* packed, void* y, const ParallelFor& parallel);

// `plan`: plan_network's for this machine. `packed`: the units' packed weights one after the other. `outputs`: a map,
// or for a head (n, classes), for each unit whose output is the network's.
void run_network(const KernelTable& kernels, const Machine& machine, const NetworkShape& shape, const NetworkPlan& plan,
                 DType dtype, const Images& x, const void* packed, void* const* outputs, const ParallelFor& parallel);

}  // namespace mnv2
