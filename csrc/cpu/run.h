// Turns fused units and the whole network into stages. Torch-free; x and y are dense NHWC unless said otherwise.
// `packed` weights are those of the kernels' family, see layout.h.
#pragma once

#include "kernels/table.h"
#include "network.h"
#include "stages.h"

namespace mnv2 {

// An image batch in any layout; strides in elements: image, channel, row, column.
struct Images {
  const void* data;
  int64_t strides[4];
};

void run_block(const KernelTable& kernels, const Machine& machine, const BlockShape& shape, DType dtype, const void* x,
               const void* packed, void* y, const ParallelFor& parallel);

void run_stem(const KernelTable& kernels, const Machine& machine, const DenseShape& shape, DType dtype, const Images& x,
              const void* packed, void* y, const ParallelFor& parallel);

// y (n, classes)
void run_head(const KernelTable& kernels, const Machine& machine, const HeadShape& shape, DType dtype, const void* x,
              const void* packed, void* y, const ParallelFor& parallel);

// `plan`: plan_network's for this machine. `packed`: the units' packed weights one after the other; y (n, classes).
void run_network(const KernelTable& kernels, const Machine& machine, const NetworkShape& shape, const NetworkPlan& plan,
                 DType dtype, const Images& x, const void* packed, void* y, const ParallelFor& parallel);

}  // namespace mnv2
