// The stream that torch launches on.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/headeronly/util/shim_utils.h>

// Weak: a torch without CUDA, which does to build with, lacks it; everything else is missed at link.
#pragma weak aoti_torch_get_current_cuda_stream

namespace mnv2 {

// The cudaStream_t.
inline void* current_stream(int32_t device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return stream;
}

}  // namespace mnv2
