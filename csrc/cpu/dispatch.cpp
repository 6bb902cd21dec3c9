#include "dispatch.h"

#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>

namespace mnv2 {

std::vector<const KernelTable*> supported_kernels() {
  std::vector<const KernelTable*> tables{&kScalarKernels};
#ifdef MNV2_FUSED_X86_KERNELS
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    tables.push_back(&kAvx2Kernels);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
      tables.push_back(&kAvx512Kernels);
    }
  }
#endif
  return tables;
}

namespace {

const KernelTable& choose() {
  const std::vector<const KernelTable*> tables = supported_kernels();
  const char* wanted = std::getenv("MNV2_FUSED_CPU_ISA");
  if (!wanted || !*wanted) return *tables.back();
  std::string names;
  for (const KernelTable* table : tables) {
    if (table->name == std::string(wanted)) return *table;
    names += names.empty() ? table->name : std::string(", ") + table->name;
  }
  throw std::runtime_error("mnv2_fused: MNV2_FUSED_CPU_ISA must be one of " + names + " on this machine, got '" +
                           wanted + "'");
}

int64_t cache_bytes(int name, int64_t otherwise) {
  const long bytes = sysconf(name);
  return bytes > 0 ? bytes : otherwise;
}

std::atomic<int64_t> pretended_l1{0}, pretended_l2{0};

}  // namespace

void pretend_caches(int64_t l1, int64_t l2) {
  pretended_l1 = l1;
  pretended_l2 = l2;
}

const KernelTable& kernels() {
  static const KernelTable& table = choose();
  return table;
}

Machine machine(int64_t threads) {
#ifdef _SC_LEVEL1_DCACHE_SIZE
  static const int64_t l1 = cache_bytes(_SC_LEVEL1_DCACHE_SIZE, 32 << 10);
  static const int64_t l2 = cache_bytes(_SC_LEVEL2_CACHE_SIZE, 512 << 10);
#else
  const int64_t l1 = 32 << 10, l2 = 512 << 10;
#endif
  const int64_t other_l1 = pretended_l1, other_l2 = pretended_l2;
  return {kernels().lanes, other_l1 > 0 ? other_l1 : l1, other_l2 > 0 ? other_l2 : l2, threads};
}

}  // namespace mnv2
