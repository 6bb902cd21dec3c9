// Everything here is compiled for one ISA: no standard containers, no torch, anonymous namespaces throughout, so that
// the linker can never put a function of this file in place of a portable one.
#include "simd/f32_avx512.h"  // first: the others are written in terms of its Vec

#include "all-inl.h"

namespace mnv2 {

extern constinit const KernelTable kAvx512Kernels = kernel_table("avx512");

}  // namespace mnv2
