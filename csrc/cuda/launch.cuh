// The table of launch.h for one arithmetic.
#pragma once

#include <cuda_runtime.h>

#include "arguments.h"
#include "launch.h"
#include "variants.cuh"

namespace mnv2 {
namespace cuda {

// CUDA's name of an error, or null.
inline const char* name_of(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorName(error); }

// Loads a kernel on the current device, so that its first launch may be captured. Its thread blocks may have all of the
// shared memory, and every kernel prefers the same share of L1 as such: kernels with different shares cannot run on a
// multiprocessor side by side, and the next kernel could not start before this one has ended.
template <class Args>
cudaError_t load(void (*kernel)(Args), int64_t shared_block, int carveout) {
  cudaFuncAttributes unused{};
  cudaError_t error = cudaFuncGetAttributes(&unused, kernel);
  if (error == cudaSuccess)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_block));
  if (error == cudaSuccess)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, carveout);
  return error;
}

template <class Args>
const char* launch(void (*kernel)(Args), const Grid& grid, const Args& args, Stream stream) {
  cudaLaunchAttribute attributes[2]{};
  unsigned count = 0;
  if (stream.dependent_launch) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (grid.cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count++].val.clusterDim = {1, 1, static_cast<unsigned>(grid.cluster)};
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y), static_cast<unsigned>(grid.z));
  config.blockDim = dim3(static_cast<unsigned>(grid.threads));
  config.dynamicSmemBytes = static_cast<size_t>(grid.shared);
  config.stream = static_cast<cudaStream_t>(stream.handle);
  config.attrs = attributes;
  config.numAttrs = count;
  return name_of(cudaLaunchKernelEx(&config, kernel, args));
}

template <class M>
constexpr KernelTable kernel_table() {
  return {
      .compiled_for =
          [](int* capability) {
            cudaFuncAttributes attributes{};
            const char* error = name_of(cudaFuncGetAttributes(&attributes, pack_kernel<M>));
            *capability = attributes.ptxVersion;
            return error;
          },
      .load =
          [](int64_t shared_block, int carveout) {
            // Else a capture by any thread forbids to load.
            cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
            cudaError_t error = cudaThreadExchangeStreamCaptureMode(&mode);
            if (error != cudaSuccess) return name_of(error);
            for_each_kernel<M>([&](auto* kernel) {
              if (error == cudaSuccess) error = load(kernel, shared_block, carveout);
            });
            cudaThreadExchangeStreamCaptureMode(&mode);
            return name_of(error);
          },
      .pack =
          [](const PackArgs& a, Stream stream) {
            const Stream alone{.handle = stream.handle, .dependent_launch = false};
            return launch(pack_kernel<M>, pack_grid(a), a, alone);
          },
      .block =
          [](const BlockArgs& a, const BlockPlan& plan, Stream stream) {
            const char* error = nullptr;
            with_block_kernel<M>(a, plan.columns.tiles,
                                 [&](auto* kernel) { error = launch(kernel, block_grid(plan, a), a, stream); });
            return error;
          },
      .stem = [](const StemArgs& a, Stream stream) { return launch(stem_kernel<M>, stem_grid(a), a, stream); },
      .pool =
          [](const PoolArgs& a, Stream stream) {
            const char* error = nullptr;
            with_pool_kernel<M>(a, [&](auto* kernel) { error = launch(kernel, pool_grid(a), a, stream); });
            return error;
          },
      .classify =
          [](const ClassifyArgs& a, Stream stream) {
            return launch(classify_kernel<typename LinearMath<M>::Type>, classify_grid(a), a, stream);
          },
  };
}

}  // namespace cuda
}  // namespace mnv2
