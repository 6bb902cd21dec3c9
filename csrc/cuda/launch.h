// Starts the kernels: a table of functions by arithmetic, as csrc/cpu/kernels/table.h for instruction sets. Torch-free.
#pragma once

#include "args.h"
#include "plan.h"

namespace mnv2 {
namespace cuda {

struct Stream {
  void* handle;           // a cudaStream_t
  bool dependent_launch;  // a kernel may start before the one ahead of it has ended; it waits by itself
};

// Every function returns null, or CUDA's name of the error.
struct KernelTable {
  // The compute capability (80, 90 ...) for which the kernels that run on the current device were compiled. Kernels for
  // less than 90 do not wait for the kernel ahead.
  const char* (*compiled_for)(int* capability);
  // Once for each device, which is current, before any of those below. shared_block: Device's. carveout: percent of a
  // multiprocessor's L1 that kernels prefer as shared memory; -1: the driver's choice. It may be called while a graph
  // is captured.
  const char* (*load)(int64_t shared_block, int carveout);
  const char* (*pack)(const PackArgs&, Stream);
  const char* (*block)(const BlockArgs&, const BlockPlan&, Stream);  // tickets must be zero
  const char* (*stem)(const StemArgs&, Stream);
  const char* (*pool)(const PoolArgs&, Stream);
  const char* (*classify)(const ClassifyArgs&, Stream);
};

extern const KernelTable kHalfKernels, kBFloat16Kernels;
extern const KernelTable kTf32Kernels, kFloatKernels;  // fp32 storage; products of one or two tf32 parts

}  // namespace cuda
}  // namespace mnv2
