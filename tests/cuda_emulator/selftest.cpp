// Small kernels for tests/cuda/test_cuda_emulator.py, correct and broken ones.
#include <span>
#include <type_traits>

#include "../../csrc/cuda/device.cuh"

using namespace mnv2::device;
using mnv2::emulator::GuardedMemory;
using mnv2::emulator::launch;
using mnv2::emulator::report;
using mnv2::emulator::Schedule;

namespace {

constexpr int kThreads = 96;

// Unpacks 32-bit registers, each with two 16-bit values.
template <class T>
MNV2_KERNEL(kThreads)
unpack_kernel(const uint32_t* packed, float* values, int count) {
  const int i = block_index_x() * kThreads + thread_index();
  if (i >= count) return;
  values[2 * i] = unpack_first<T>(packed[i]);
  values[2 * i + 1] = unpack_second<T>(packed[i]);
}

template <class T>
MNV2_KERNEL(kThreads)
pack_kernel(const float* values, uint32_t* packed, int count) {
  const int i = block_index_x() * kThreads + thread_index();
  if (i < count) packed[i] = pack<T>(values[2 * i], values[2 * i + 1]);
}

MNV2_KERNEL(kThreads) tf32_kernel(const float* values, uint32_t* bits, uint32_t* whole, uint32_t* rest, int count) {
  const int i = block_index_x() * kThreads + thread_index();
  if (i >= count) return;
  bits[i] = to_tf32(values[i]);
  split_tf32(values[i], whole[i], rest[i]);
}

MNV2_KERNEL(kThreads)
half2_kernel(const uint32_t* a, const uint32_t* b, const uint32_t* c, uint32_t* fma, uint32_t* clamped, int count) {
  const int i = block_index_x() * kThreads + thread_index();
  if (i >= count) return;
  fma[i] = fma_half2(a[i], b[i], c[i]);
  clamped[i] = min_pair<Half>(max_pair<Half>(a[i], b[i]), c[i]);
}

MNV2_KERNEL(kThreads)
float_kernel(const float* a, const float* b, const float* c, float* sum, float* clamped, int count) {
  const int i = block_index_x() * kThreads + thread_index();
  if (i >= count) return;
  sum[i] = mnv2::device::fma(a[i], b[i], c[i]);
  clamped[i] = clamp(a[i], b[i], c[i]);
}

// c (16 rows a warp, 8 columns) += a b, for 16-bit a (16 rows a warp, depth columns) and b, which is stored transposed
// (8 rows, depth columns).
template <class T>
MNV2_KERNEL(kThreads)
multiply16_kernel(const uint16_t* a, const uint16_t* b, float* c, int depth) {
  const int warp = thread_index() / 32, g = thread_index() % 32 / 4, t = thread_index() % 4;
  a += 16 * warp * depth;
  c += 16 * warp * 8;
  const auto pair = [&](const uint16_t* matrix, int row, int column) {
    return *reinterpret_cast<const uint32_t*>(matrix + row * depth + column);
  };
  float d[4];
  for (int i = 0; i < 4; ++i) d[i] = c[(g + i / 2 * 8) * 8 + 2 * t + i % 2];
  for (int k = 2 * t; k < depth; k += 16) {
    const uint32_t left[4] = {pair(a, g, k), pair(a, g + 8, k), pair(a, g, k + 8), pair(a, g + 8, k + 8)};
    const uint32_t right[2] = {pair(b, g, k), pair(b, g, k + 8)};
    mma16<T>(d, d, left, right);
  }
  for (int i = 0; i < 4; ++i) c[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = d[i];
}

MNV2_KERNEL(kThreads) multiply8_kernel(const uint32_t* a, const uint32_t* b, float* c, int depth) {
  const int warp = thread_index() / 32, g = thread_index() % 32 / 4, t = thread_index() % 4;
  a += 16 * warp * depth;
  c += 16 * warp * 8;
  float d[4];
  for (int i = 0; i < 4; ++i) d[i] = c[(g + i / 2 * 8) * 8 + 2 * t + i % 2];
  for (int k = t; k < depth; k += 8) {
    const uint32_t left[4] = {a[g * depth + k], a[(g + 8) * depth + k], a[g * depth + k + 4],
                              a[(g + 8) * depth + k + 4]};
    const uint32_t right[2] = {b[g * depth + k], b[g * depth + k + 4]};
    mma8_tf32(d, left, right);
  }
  for (int i = 0; i < 4; ++i) c[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = d[i];
}

// One product of raw registers: each thread holds 4 of d, 4 of a and 2 of b.
template <class T>
MNV2_KERNEL(32)
registers_kernel(float* d, const uint32_t* a, const uint32_t* b) {
  const int lane = thread_index();
  auto& sums = reinterpret_cast<float (&)[4]>(d[4 * lane]);
  const auto& left = reinterpret_cast<const uint32_t (&)[4]>(a[4 * lane]);
  const auto& right = reinterpret_cast<const uint32_t (&)[2]>(b[2 * lane]);
  if constexpr (std::is_same_v<T, float>) {
    mma8_tf32(sums, left, right);
  } else {
    mma16<T>(sums, sums, left, right);
  }
}

MNV2_KERNEL(kThreads) shuffle_kernel(const float* x, float* y, int mask) {
  y[thread_index()] = shuffle_xor(x[thread_index()], mask);
}

// Each thread's value goes to the next one of its warp.
template <bool kBarriers>
MNV2_KERNEL(kThreads)
rotate_kernel(const float* x, float* y, int rows) {
  float* const values = reinterpret_cast<float*>(shared_memory());
  const int thread = thread_index(), from = thread / 32 * 32 + (thread + 31) % 32;
  for (int i = thread; i < rows * kThreads; i += kThreads) {
    values[thread] = x[i];
    if (kBarriers) warp_barrier();
    y[i] = values[from];
    if (kBarriers) warp_barrier();
  }
}

// Records the initial contents of shared memory, and the order of CTAs.
MNV2_KERNEL(kThreads) first_look_kernel(float* values, uint32_t* ctas, uint32_t* order) {
  const int cta = (block_index_z() * 2 + block_index_y()) * 3 + block_index_x();
  float* const value = reinterpret_cast<float*>(shared_memory()) + thread_index();
  values[cta * kThreads + thread_index()] = *value;
  *value = 0;
  if (thread_index() == 0) order[ordered_add(ctas, 1)] = static_cast<uint32_t>(cta);
}

// The sum of each CTA's rows of kThreads values, one after the other.
enum ReduceFault { kReduceRight, kNoBarrierBeforeRead, kNoBarrierBeforeWrite };
template <int kFault>
MNV2_KERNEL(kThreads)
reduce_kernel(const float* x, float* sums, int rows) {
  float* const of_warps = reinterpret_cast<float*>(shared_memory());
  const int cta = (block_index_z() * 2 + block_index_y()) * 3 + block_index_x();
  for (int row = cta * rows; row < (cta + 1) * rows; ++row) {
    float sum = x[row * kThreads + thread_index()];
    for (int mask = 16; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
    if (thread_index() % 32 == 0) of_warps[thread_index() / 32] = sum;
    if (kFault != kNoBarrierBeforeRead) barrier();
    // The last thread reads what the first of each warp has written.
    if (thread_index() == kThreads - 1) sums[row] = of_warps[0] + of_warps[1] + of_warps[2];
    if (kFault != kNoBarrierBeforeWrite) barrier();
  }
}

// Each CTA copies its chunks of kThreads vectors of 16 bytes, reversed, while the next chunk is loaded (one too many at
// the end). Vectors from `valid` on are zero.
enum CopyFault { kCopyRight, kNoWait, kWaitForTooFew, kNoCommit, kNoBarrierAfterWait, kNoBarrierBeforeNext };
template <int kFault>
MNV2_KERNEL(kThreads)
copy_kernel(const Four* x, Four* y, int chunks, int valid) {
  Four* const buffers = reinterpret_cast<Four*>(shared_memory());
  const int thread = thread_index();
  const auto fetch = [&](int chunk) {
    const int i = (block_index_x() * chunks + chunk) * kThreads + thread;
    copy_async(buffers + chunk % 2 * kThreads + thread, i < valid ? x + i : x, i < valid);
    if (kFault != kNoCommit) copy_async_commit();
  };
  fetch(0);
  for (int chunk = 0; chunk < chunks; ++chunk) {
    fetch(chunk + 1);
    if (kFault != kNoWait) copy_async_wait<kFault == kWaitForTooFew ? 2 : 1>();
    if (kFault != kNoBarrierAfterWait) barrier();
    y[(block_index_x() * chunks + chunk) * kThreads + thread] = buffers[chunk % 2 * kThreads + kThreads - 1 - thread];
    if (kFault != kNoBarrierBeforeNext) barrier();
  }
}

// Round by round, the sum of the rows of a cluster's CTAs, kThreads vectors each, by every CTA for its share of them.
enum ClusterFault { kClusterRight, kNoClusterBarrierBeforeRead, kNoClusterBarrierBeforeWrite, kNoClusterBarrierAtEnd };
template <int kFault>
MNV2_KERNEL(kThreads)
cluster_kernel(const float* x, float* sums, int ctas, int rounds) {
  float* const own = reinterpret_cast<float*>(shared_memory()) + 4 * thread_index();
  const int z = block_index_z(), cluster = z / ctas, clusters = 2, row = 4 * kThreads;
  for (int round = 0; round < rounds; ++round) {
    const int place = (round * 2 + block_index_x()) * clusters + cluster;
    for (int i = 0; i < 4; ++i) own[i] = x[(place * ctas + z % ctas) * row + 4 * thread_index() + i];
    if (kFault != kNoClusterBarrierBeforeRead) cluster_barrier();
    if (thread_index() % ctas == z % ctas) {
      for (int other = cluster * ctas; other < (cluster + 1) * ctas; ++other) {
        float values[4];
        load_from_block(own, other, values);
        for (int i = 0; i < 4; ++i) sums[place * row + 4 * thread_index() + i] += values[i];
      }
    }
    const bool last = round + 1 == rounds;
    if (kFault != (last ? kNoClusterBarrierAtEnd : kNoClusterBarrierBeforeWrite)) cluster_barrier();
  }
}

int recurse(const volatile int* above) {
  const volatile int here = *above;
  return here ? recurse(&here) + here : 0;
}

enum Misuse {
  kSkippedBarrier,
  kTwoBarriers,
  kSkippedMma,
  kOtherCollective,
  kOverrun,
  kUnderrun,
  kGlobalOverrun,
  kUnalignedTo,
  kUnalignedFrom,
  kCopyOverrun,
  kWrongMask,
  kStackOverrun,
  kNoWaitForKernel,
  kCopyBeforeWait,
  kNeverWaits,
  // in clusters of two
  kSkippedClusterBarrier,
  kOtherBarrier,
  kOtherCluster,
  kBlockOverrun,
  kUnalignedFromBlock,
};
MNV2_KERNEL(64) misuse_kernel(int misuse, uint32_t* global, int count) {
  const int thread = thread_index();
  unsigned char* const shared = shared_memory();
  float d[4] = {};
  const uint32_t a[4] = {}, b[2] = {};
  switch (misuse) {
    case kSkippedBarrier:
      if (thread != 40) barrier();
      break;
    case kTwoBarriers:
      if (thread < 32) {
        barrier();
      } else {
        barrier();
      }
      break;
    case kSkippedMma:
      if (thread != 40) mma16<Half>(d, d, a, b);
      barrier();
      break;
    case kOtherCollective:
      if (thread == 40) {
        mma16<Half>(d, d, a, b);
      } else {
        mma8_tf32(d, a, b);
      }
      break;
    case kOverrun: shared[thread + 1] = 0; break;
    case kUnderrun: shared[thread - 1] = 0; break;
    case kGlobalOverrun: global[count - 63 + thread] = 0; break;
    case kUnalignedTo: copy_async(shared + 8, global, false); break;
    case kUnalignedFrom: copy_async(shared, global + 1, true); break;
    case kCopyOverrun: copy_async(shared + 16 * thread, global, true); break;
    case kWrongMask: shuffle_xor(0, 32); break;
    case kStackOverrun: global[0] = static_cast<uint32_t>(recurse(&count)); break;
    case kNoWaitForKernel:
      if (block_index_x() == 1) wait_for_previous_kernel();
      global[thread] = 0;
      break;
    case kCopyBeforeWait:
      copy_async(shared, global, true);
      copy_async_commit();
      wait_for_previous_kernel();
      copy_async_wait<0>();
      break;
    case kNeverWaits: break;
    case kSkippedClusterBarrier:
      if (thread != 40 || block_index_z() % 2 == 0) cluster_barrier();
      break;
    case kOtherBarrier:
      if (block_index_z() % 2 == 0) {
        barrier();
        cluster_barrier();
      }
      cluster_barrier();
      break;
    case kOtherCluster: load_from_block(reinterpret_cast<float*>(shared), block_index_z() / 2 * 2 + 2, d); break;
    case kBlockOverrun: load_from_block(reinterpret_cast<float*>(shared + 64), block_index_z(), d); break;
    case kUnalignedFromBlock: load_from_block(reinterpret_cast<float*>(shared + 8), block_index_z(), d); break;
  }
}

constexpr Schedule kFirst = Schedule::number(0);
int ctas_for(int count) { return (count + kThreads - 1) / kThreads; }

}  // namespace

extern "C" {

const char* run_unpack(int bfloat16, const uint32_t* packed, float* values, int count) {
  return report([&] {
    launch({ctas_for(count), 1, 1}, kThreads, 0, kFirst, [&] {
      bfloat16 ? unpack_kernel<BFloat16>(packed, values, count) : unpack_kernel<Half>(packed, values, count);
    });
  });
}

const char* run_pack(int bfloat16, const float* values, uint32_t* packed, int count) {
  return report([&] {
    launch({ctas_for(count), 1, 1}, kThreads, 0, kFirst,
           [&] { bfloat16 ? pack_kernel<BFloat16>(values, packed, count) : pack_kernel<Half>(values, packed, count); });
  });
}

const char* run_tf32(const float* values, uint32_t* bits, uint32_t* whole, uint32_t* rest, int count) {
  return report([&] {
    launch({ctas_for(count), 1, 1}, kThreads, 0, kFirst, [&] { tf32_kernel(values, bits, whole, rest, count); });
  });
}

const char* run_half2(const uint32_t* a, const uint32_t* b, const uint32_t* c, uint32_t* fma, uint32_t* clamped,
                      int count) {
  return report([&] {
    launch({ctas_for(count), 1, 1}, kThreads, 0, kFirst, [&] { half2_kernel(a, b, c, fma, clamped, count); });
  });
}

const char* run_float(const float* a, const float* b, const float* c, float* sum, float* clamped, int count) {
  return report([&] {
    launch({ctas_for(count), 1, 1}, kThreads, 0, kFirst, [&] { float_kernel(a, b, c, sum, clamped, count); });
  });
}

// 48 rows of a; type: 0 half, 1 bfloat16, 2 tf32.
const char* run_multiply(int schedule, int type, const void* a, const void* b, float* c, int depth) {
  const auto half = [](const void* p) { return static_cast<const uint16_t*>(p); };
  const auto word = [](const void* p) { return static_cast<const uint32_t*>(p); };
  return report([&] {
    launch({1, 1, 1}, kThreads, 0, Schedule::number(schedule), [&] {
      if (type == 0) multiply16_kernel<Half>(half(a), half(b), c, depth);
      if (type == 1) multiply16_kernel<BFloat16>(half(a), half(b), c, depth);
      if (type == 2) multiply8_kernel(word(a), word(b), c, depth);
    });
  });
}

const char* run_registers(int type, float* d, const uint32_t* a, const uint32_t* b) {
  return report([&] {
    launch({1, 1, 1}, 32, 0, kFirst, [&] {
      if (type == 0) registers_kernel<Half>(d, a, b);
      if (type == 1) registers_kernel<BFloat16>(d, a, b);
      if (type == 2) registers_kernel<float>(d, a, b);
    });
  });
}

const char* run_shuffle(int schedule, const float* x, float* y, int mask) {
  return report(
      [&] { launch({1, 1, 1}, kThreads, 0, Schedule::number(schedule), [&] { shuffle_kernel(x, y, mask); }); });
}

const char* run_rotate(int schedule, int barriers, const float* x, float* y, int rows) {
  return report([&] {
    launch({1, 1, 1}, kThreads, kThreads * sizeof(float), Schedule::number(schedule),
           [&] { barriers ? rotate_kernel<true>(x, y, rows) : rotate_kernel<false>(x, y, rows); });
  });
}

const char* run_first_look(int schedule, float* values, uint32_t* ctas, uint32_t* order) {
  return report([&] {
    launch({3, 2, 2}, kThreads, kThreads * sizeof(float), Schedule::number(schedule),
           [&] { first_look_kernel(values, ctas, order); });
  });
}

const char* run_reduce(int schedule, int fault, const float* x, float* sums, int rows) {
  return report([&] {
    launch({3, 2, 2}, kThreads, kThreads / 32 * sizeof(float), Schedule::number(schedule), [&] {
      if (fault == kReduceRight) reduce_kernel<kReduceRight>(x, sums, rows);
      if (fault == kNoBarrierBeforeRead) reduce_kernel<kNoBarrierBeforeRead>(x, sums, rows);
      if (fault == kNoBarrierBeforeWrite) reduce_kernel<kNoBarrierBeforeWrite>(x, sums, rows);
    });
  });
}

const char* run_copy(int schedule, int fault, const Four* x, Four* y, int chunks, int valid) {
  return report([&] {
    launch({2, 1, 1}, kThreads, 2 * kThreads * sizeof(Four), Schedule::number(schedule), [&] {
      if (fault == kCopyRight) copy_kernel<kCopyRight>(x, y, chunks, valid);
      if (fault == kNoWait) copy_kernel<kNoWait>(x, y, chunks, valid);
      if (fault == kWaitForTooFew) copy_kernel<kWaitForTooFew>(x, y, chunks, valid);
      if (fault == kNoCommit) copy_kernel<kNoCommit>(x, y, chunks, valid);
      if (fault == kNoBarrierAfterWait) copy_kernel<kNoBarrierAfterWait>(x, y, chunks, valid);
      if (fault == kNoBarrierBeforeNext) copy_kernel<kNoBarrierBeforeNext>(x, y, chunks, valid);
    });
  });
}

const char* run_misuse(int schedule, int misuse) {
  return report([&] {
    const GuardedMemory global(256);
    const GuardedMemory* const in_flight[] = {&global};
    const mnv2::emulator::Grid alone{2, 1, 1}, clusters{2, 1, 4, 2};
    launch(
        misuse > kNeverWaits ? clusters : alone, 64, 64, Schedule::number(schedule),
        [&] { misuse_kernel(misuse, reinterpret_cast<uint32_t*>(global.data()), 64); },
        std::span(in_flight).first(misuse >= kNoWaitForKernel && misuse <= kNeverWaits));
  });
}

// x: (rounds, 2, 2 clusters, ctas, 4 kThreads); sums: the same without ctas.
const char* run_cluster(int schedule, int fault, const float* x, float* sums, int ctas, int rounds) {
  return report([&] {
    launch({2, 1, 2 * ctas, ctas}, kThreads, 4 * kThreads * sizeof(float), Schedule::number(schedule), [&] {
      if (fault == kClusterRight) cluster_kernel<kClusterRight>(x, sums, ctas, rounds);
      if (fault == kNoClusterBarrierBeforeRead) cluster_kernel<kNoClusterBarrierBeforeRead>(x, sums, ctas, rounds);
      if (fault == kNoClusterBarrierBeforeWrite) cluster_kernel<kNoClusterBarrierBeforeWrite>(x, sums, ctas, rounds);
      if (fault == kNoClusterBarrierAtEnd) cluster_kernel<kNoClusterBarrierAtEnd>(x, sums, ctas, rounds);
    });
  });
}

const char* run_launch(int x, int y, int z, int cluster, int threads, int shared_bytes) {
  return report([&] { launch({x, y, z, cluster}, threads, static_cast<size_t>(shared_bytes), kFirst, [] {}); });
}
}
