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

template <class Args>
const char* launch(void (*kernel)(Args), const Grid& grid, const Args& args, Stream stream) {
  constexpr int64_t kWithoutAsking = 48 << 10;
  if (grid.shared > kWithoutAsking) {
    // Always the device's limit: another thread may be about to launch the same kernel with more.
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                   static_cast<int>(stream.shared_block));
    if (error != cudaSuccess) return name_of(error);
  }
  if (stream.carveout >= 0) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, stream.carveout);
    if (error != cudaSuccess) return name_of(error);
  }
  cudaLaunchAttribute dependent{};
  dependent.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  dependent.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y), static_cast<unsigned>(grid.z));
  config.blockDim = dim3(static_cast<unsigned>(grid.threads));
  config.dynamicSmemBytes = static_cast<size_t>(grid.shared);
  config.stream = static_cast<cudaStream_t>(stream.handle);
  config.attrs = &dependent;
  config.numAttrs = stream.dependent_launch ? 1 : 0;
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
      .pack =
          [](const PackArgs& a, Stream stream) {
            const Stream alone{.handle = stream.handle, .dependent_launch = false, .shared_block = 0, .carveout = -1};
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
      .pool = [](const PoolArgs& a, Stream stream) { return launch(pool_kernel<M>, pool_grid(a), a, stream); },
      .classify =
          [](const ClassifyArgs& a, Stream stream) {
            return launch(classify_kernel<typename LinearMath<M>::Type>, classify_grid(a), a, stream);
          },
  };
}

}  // namespace cuda
}  // namespace mnv2
