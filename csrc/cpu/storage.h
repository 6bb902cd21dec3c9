// Activations in memory, whatever their storage type. Internal linkage: ISA files include it.
#pragma once

#include "../shapes.h"

namespace mnv2 {

// Elements to read, and elements to write.
struct Source {
  const void* data;
  DType dtype;
};
struct Sink {
  void* data;
  DType dtype;
};

// The same from element i on.
static inline Source at(Source s, int64_t i) {
  return {static_cast<const char*>(s.data) + i * dtype_bytes(s.dtype), s.dtype};
}
static inline Sink at(Sink s, int64_t i) { return {static_cast<char*>(s.data) + i * dtype_bytes(s.dtype), s.dtype}; }

// Floats of scratch that `count` elements need: kernels use floats in place and widen everything else.
static inline int64_t widened(DType dtype, int64_t count) { return dtype == DType::kFloat32 ? 0 : count; }

}  // namespace mnv2
