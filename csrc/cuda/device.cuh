// The hardware, as the kernels use it. tests/cuda_emulator has the same names for the host, so that the kernels
// themselves run there. No other file of device code may use a CUDA name.
//
// Activations are stored as Half, BFloat16 or float. Two 16-bit values lie in one 32-bit register, the first in the low
// half.
#pragma once

#include <cstdint>

#ifdef MNV2_CUDA_EMULATOR
#include "emulator.h"
#else

#define MNV2_DEVICE __device__ __forceinline__
#define MNV2_APART __device__ __noinline__  // the caller's registers are as if it were not there
#define MNV2_CONSTANT __grid_constant__     // a kernel's argument that such a function gets by reference
#define MNV2_KERNEL(...) \
  __global__ void __launch_bounds__(__VA_ARGS__)  // most threads of a block, least blocks at once
#define MNV2_UNROLL _Pragma("unroll")
#define MNV2_NO_UNROLL _Pragma("unroll 1")

namespace mnv2 {
namespace device {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// ---------------------------------------------------------------------------------------------- threads and blocks

MNV2_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
MNV2_DEVICE int block_index_x() { return static_cast<int>(blockIdx.x); }
MNV2_DEVICE int block_index_y() { return static_cast<int>(blockIdx.y); }
MNV2_DEVICE int block_index_z() { return static_cast<int>(blockIdx.z); }

// The block's dynamic shared memory, 16-byte aligned; not cleared.
MNV2_DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char mnv2_shared[];
  return mnv2_shared;
}

// All threads of the block.
MNV2_DEVICE void barrier() { __syncthreads(); }
// All threads of the warp; no load moves across it.
MNV2_DEVICE void warp_barrier() { __syncwarp(); }

MNV2_DEVICE float shuffle_xor(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }

// Adds to a counter in global memory, and returns what it was. Writes from before it, also those of other threads that
// a barrier has put before it, are seen behind an addition that comes later, and behind a barrier after that one.
MNV2_DEVICE uint32_t ordered_add(uint32_t* address, uint32_t value) {
  uint32_t before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(before) : "l"(address), "r"(value) : "memory");
  return before;
}

// Programmatic dependent launch. Before wait_for_previous_kernel() a kernel must not read what the kernel ahead writes,
// nor write what it reads. After allow_next_kernel() the next kernel may be started.
MNV2_DEVICE void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
MNV2_DEVICE void allow_next_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Clusters of thread blocks, where the hardware has them: those along z of a launch. Their shared memories are mapped
// into each other.
#if __CUDA_ARCH__ >= 900
constexpr bool kHasClusters = true;
#else
constexpr bool kHasClusters = false;
#endif
// All threads of the cluster's blocks. What was written before it, also to shared memory, is seen behind it.
MNV2_DEVICE void cluster_barrier() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}
// Four values from where `own` is, but in the shared memory of the cluster's block with that z.
MNV2_DEVICE void load_from_block(const float* own, int z, float (&to)[4]) {
#if __CUDA_ARCH__ >= 900
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(own));
  asm volatile("{.reg .u32 a; mapa.shared::cluster.u32 a, %4, %5; ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [a];}"
               : "=f"(to[0]), "=f"(to[1]), "=f"(to[2]), "=f"(to[3])
               : "r"(address), "r"(z)
               : "memory");
#endif
}

// -------------------------------------------------------------------------------------------------------- copying

struct alignas(8) Two {
  uint32_t x, y;
};
struct alignas(16) Four {
  uint32_t x, y, z, w;
};

// 16 bytes from global to shared memory, both so aligned; zeros if not `valid` (`from` is then not read).
MNV2_DEVICE void copy_async(void* to, const void* from, bool valid) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(bytes) : "memory");
}
// Closes the group of this thread's copies so far.
MNV2_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits for this thread's groups except the last `kPending`. For those of other threads a barrier must follow.
template <int kPending>
MNV2_DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Copies of whole pieces of memory by one thread, where the hardware has them. An Arrival in shared memory counts their
// bytes, phase by phase.
using Arrival = uint64_t;
MNV2_DEVICE constexpr bool bulk_copies() {
#if __CUDA_ARCH__ >= 900
  return true;
#else
  return false;
#endif
}
// By one thread, before it copies; for other threads a barrier must follow.
MNV2_DEVICE void start_arrival(Arrival* arrival) {
#if __CUDA_ARCH__ >= 900
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(arrival));
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(address) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}
// By one thread, once a phase: the bytes that its copies bring.
MNV2_DEVICE void expect_bytes(Arrival* arrival, int bytes) {
#if __CUDA_ARCH__ >= 900
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(arrival));
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address), "r"(bytes) : "memory");
#endif
}
// From global to shared memory, both aligned to 16 bytes; so many bytes are also a multiple of 16, and not 0.
MNV2_DEVICE void copy_bulk(void* to, const void* from, int bytes, Arrival* arrival) {
#if __CUDA_ARCH__ >= 900
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  const uint32_t counter = static_cast<uint32_t>(__cvta_generic_to_shared(arrival));
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(address),
               "l"(from), "r"(bytes), "r"(counter)
               : "memory");
#endif
}
// By all threads: until the copies of the arrival's phase are there. odd: whether the number of phases before it is.
MNV2_DEVICE void wait_for_arrival(Arrival* arrival, bool odd) {
#if __CUDA_ARCH__ >= 900
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(arrival)), parity = odd;
  uint32_t done;
  do {
    asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.b32 %0, 1, 0, p;}"
                 : "=r"(done)
                 : "r"(address), "r"(parity)
                 : "memory");
  } while (done == 0);
#endif
}

// Four matrices of 8 x 8 values of 16 bits in shared memory, for a whole warp. row: row lane % 8 of matrix lane / 8, 16
// bytes so aligned. Of each matrix lane 4 g + t gets values 2 t and 2 t + 1 of row g.
MNV2_DEVICE void load_matrices(const unsigned char* row, uint32_t (&to)[4]) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(address)
               : "memory");
}

// Loads values that no kernel in flight writes: 2, 4 or 8, aligned to all of them or to 16 bytes.
template <int kCount>
MNV2_DEVICE void load_constants(const float* from, float (&values)[kCount]) {
  if constexpr (kCount == 2) {
    const float2 v = __ldg(reinterpret_cast<const float2*>(from));
    values[0] = v.x, values[1] = v.y;
  } else {
    MNV2_UNROLL
    for (int i = 0; i < kCount; i += 4) {
      const float4 v = __ldg(reinterpret_cast<const float4*>(from + i));
      values[i] = v.x, values[i + 1] = v.y, values[i + 2] = v.z, values[i + 3] = v.w;
    }
  }
}

// Loads a value that another block, or a kernel that ended while this one was running, has written: not from the L1
// cache, which may have an older one.
MNV2_DEVICE float load_shared_result(const float* from) { return __ldcg(from); }
MNV2_DEVICE Half load_shared_result(const Half* from) { return {__ldcg(&from->bits)}; }
MNV2_DEVICE BFloat16 load_shared_result(const BFloat16* from) { return {__ldcg(&from->bits)}; }

// ------------------------------------------------------------------------------------------------------ arithmetic

MNV2_DEVICE float bits_to_float(uint32_t bits) { return __uint_as_float(bits); }
MNV2_DEVICE uint32_t float_to_bits(float value) { return __float_as_uint(value); }
MNV2_DEVICE float fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }

// NaN stays NaN, as in torch.clamp.
MNV2_DEVICE float clamp(float value, float lo, float hi) {
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(value), "f"(lo));
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(y), "f"(hi));
  return y;
}

// To nearest, ties to even; to tf32: away from zero.
template <class T>
MNV2_DEVICE uint32_t pack(float first, float second);
template <>
MNV2_DEVICE uint32_t pack<Half>(float first, float second) {
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(second), "f"(first));
  return packed;
}
template <>
MNV2_DEVICE uint32_t pack<BFloat16>(float first, float second) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(second), "f"(first));
  return packed;
}
// The same of max(value, 0). NaN stays NaN.
template <class T>
MNV2_DEVICE uint32_t pack_relu(float first, float second);
template <>
MNV2_DEVICE uint32_t pack_relu<Half>(float first, float second) {
  uint32_t packed;
  asm("cvt.rn.relu.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(second), "f"(first));
  return packed;
}
template <>
MNV2_DEVICE uint32_t pack_relu<BFloat16>(float first, float second) {
  uint32_t packed;
  asm("cvt.rn.relu.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(second), "f"(first));
  return packed;
}
MNV2_DEVICE uint32_t to_tf32(float value) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return bits;
}
// value = whole + rest but for the last bit or two; if value is infinite, rest is 0. Volatile: otherwise the compiler
// makes all parts long before they are needed, and spills.
MNV2_DEVICE void split_tf32(float value, uint32_t& whole, uint32_t& rest) {
  asm volatile(
      "{.reg .f32 w, r; .reg .pred p; cvt.rna.tf32.f32 %0, %2; mov.b32 w, %0; sub.f32 r, %2, w; testp.infinite.f32 p, "
      "w; "
      "selp.f32 r, 0f00000000, r, p; cvt.rna.tf32.f32 %1, r;}"
      : "=&r"(whole), "=r"(rest)
      : "f"(value));
}

// `value`, but the compiler does not know that, and so computes anew what follows from it, and keeps it nowhere.
MNV2_DEVICE int forgotten(int value) {
  asm volatile("" : "+r"(value));
  return value;
}
MNV2_DEVICE int64_t forgotten(int64_t value) {
  asm volatile("" : "+l"(value));
  return value;
}
template <class T>
MNV2_DEVICE const T* forgotten(const T* global) {  // a pointer to global memory
  size_t address = __cvta_generic_to_global(global);
  asm volatile("" : "+l"(address));
  return static_cast<const T*>(__cvta_global_to_generic(address));
}

// Always 0, but the compiler does not know that and waits for `value`.
MNV2_DEVICE float zero_after(float value) {
  float zero;
  asm("{.reg .f32 v; abs.f32 v, %1; min.f32 %0, v, 0f00000000;}" : "=f"(zero) : "f"(value));
  return zero;
}

template <class T>
MNV2_DEVICE float unpack_first(uint32_t packed);
template <class T>
MNV2_DEVICE float unpack_second(uint32_t packed);
template <>
MNV2_DEVICE float unpack_first<Half>(uint32_t packed) {
  float value;
  asm("{.reg .b16 a, b; mov.b32 {a, b}, %1; cvt.f32.f16 %0, a;}" : "=f"(value) : "r"(packed));
  return value;
}
template <>
MNV2_DEVICE float unpack_second<Half>(uint32_t packed) {
  float value;
  asm("{.reg .b16 a, b; mov.b32 {a, b}, %1; cvt.f32.f16 %0, b;}" : "=f"(value) : "r"(packed));
  return value;
}
template <>
MNV2_DEVICE float unpack_first<BFloat16>(uint32_t packed) {
  return bits_to_float(packed << 16);
}
template <>
MNV2_DEVICE float unpack_second<BFloat16>(uint32_t packed) {
  return bits_to_float(packed & 0xffff0000u);
}

// On both halves of a register, each rounded once; subnormal numbers are kept. NaN stays NaN in max and min.
MNV2_DEVICE uint32_t fma_half2(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
MNV2_DEVICE uint32_t fma_relu_half2(uint32_t a, uint32_t b, uint32_t c) {  // what is negative becomes 0, NaN stays
  uint32_t d;
  asm("fma.rn.relu.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
template <class T>
MNV2_DEVICE uint32_t max_pair(uint32_t a, uint32_t b);
template <class T>
MNV2_DEVICE uint32_t min_pair(uint32_t a, uint32_t b);
template <>
MNV2_DEVICE uint32_t max_pair<Half>(uint32_t a, uint32_t b) {
  uint32_t d;
  asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}
template <>
MNV2_DEVICE uint32_t min_pair<Half>(uint32_t a, uint32_t b) {
  uint32_t d;
  asm("min.NaN.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}
template <>
MNV2_DEVICE uint32_t max_pair<BFloat16>(uint32_t a, uint32_t b) {
  uint32_t d;
  asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}
template <>
MNV2_DEVICE uint32_t min_pair<BFloat16>(uint32_t a, uint32_t b) {
  uint32_t d;
  asm("min.NaN.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}

// ---------------------------------------------------------------------------------------------------- tensor cores
// d = c + a b, or in tf32 d += a b, for a whole warp; c may be d. Sums are fp32, cut off and not rounded to nearest.
// With g = lane / 4 and t = lane % 4, a lane holds (layout of the PTX ISA)
//   of d (16 x 8): rows g, g, g + 8, g + 8 of columns 2 t, 2 t + 1, 2 t, 2 t + 1;
//   of a (16 x 16): the pairs of columns 2 t, 2 t + 1 of rows g and g + 8, then columns 2 t + 8, 2 t + 9 of the same;
//   of b (16 x 8): rows 2 t, 2 t + 1 and then 2 t + 8, 2 t + 9 of column g;
// and in tf32 of a (16 x 8) rows g, g + 8 of column t, then of column t + 4; of b (8 x 8) rows t and t + 4 of column g.

template <class T>
MNV2_DEVICE void mma16(float (&d)[4], const float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <>
MNV2_DEVICE void mma16<Half>(float (&d)[4], const float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%10,%11,%12,%13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}
template <>
MNV2_DEVICE void mma16<BFloat16>(float (&d)[4], const float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%10,%11,%12,%13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}
MNV2_DEVICE void mma8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

}  // namespace device
}  // namespace mnv2

#endif
