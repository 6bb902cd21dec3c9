// Cuts a fused unit into tasks and hands them to a parallel loop. Torch-free; x and y are dense NHWC unless said
// otherwise.
#pragma once

#include <functional>

#include "kernels/table.h"

namespace mnv2 {

// Calls the function with ranges that together cover [0, count), on any threads, and returns when all are done.
using ParallelFor = std::function<void(int64_t count, const std::function<void(int64_t begin, int64_t end)>&)>;

void run_block(const KernelTable& kernels, const BlockPlan& plan, const BlockShape& shape, DType dtype, const void* x,
               const float* packed, void* y, const ParallelFor& parallel);

// x strides in elements: image, channel, row, column.
void run_stem(const KernelTable& kernels, const StemShape& shape, DType dtype, const void* x,
              const int64_t (&strides)[4], const float* packed, void* y, int64_t threads, const ParallelFor& parallel);

// y (n, classes)
void run_head(const KernelTable& kernels, const HeadShape& shape, DType dtype, const void* x, const float* packed,
              void* y, int64_t threads, const ParallelFor& parallel);

}  // namespace mnv2
