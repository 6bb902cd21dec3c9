// Everything here is compiled for one ISA: no standard containers, no torch, anonymous namespaces throughout, so that
// the linker can never put a function of this file in place of a portable one.
#include "simd/f32_avx2.h"  // first: the others are written in terms of its Vec

#include "all-inl.h"

namespace mnv2 {

extern constinit const KernelTable kAvx2Kernels = kernel_table("avx2");

}  // namespace mnv2
