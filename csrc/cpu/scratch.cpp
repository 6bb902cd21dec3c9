#include "scratch.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>

#include <sys/mman.h>

namespace mnv2 {
namespace {

constexpr std::align_val_t kLine{64};

std::atomic<int64_t> total{0};
std::atomic<uint64_t> epoch{0};

struct Arena {
  std::unique_ptr<float, void (*)(float*)> memory{nullptr, [](float* p) { ::operator delete(p, kLine); }};
  int64_t size = 0;
  int64_t counted = 0;  // bytes of the largest request since the last reset
  uint64_t counted_epoch = 0;
};

}  // namespace

float* scratch(ScratchUse use, int64_t floats) {
  thread_local Arena arenas[static_cast<int>(ScratchUse::kCount)];
  Arena& arena = arenas[static_cast<int>(use)];
  if (floats > arena.size) {
    arena.memory.reset();
    arena.size = 0;
    arena.memory.reset(static_cast<float*>(::operator new(static_cast<size_t>(floats) * sizeof(float), kLine)));
    arena.size = floats;
    if (use >= ScratchUse::kTraining)
      advise_huge_pages(arena.memory.get(), floats * static_cast<int64_t>(sizeof(float)));
  }
  const uint64_t now = epoch.load(std::memory_order_relaxed);
  if (arena.counted_epoch != now) arena.counted = 0, arena.counted_epoch = now;
  const int64_t bytes = floats * static_cast<int64_t>(sizeof(float));
  if (bytes > arena.counted) {
    total.fetch_add(bytes - arena.counted, std::memory_order_relaxed);
    arena.counted = bytes;
  }
  return arena.memory.get();
}

void advise_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr intptr_t kHuge = intptr_t{2} << 20;
  const intptr_t first = (reinterpret_cast<intptr_t>(data) + kHuge - 1) / kHuge * kHuge;
  const intptr_t last = (reinterpret_cast<intptr_t>(data) + bytes) / kHuge * kHuge;
  if (first < last) madvise(reinterpret_cast<void*>(first), static_cast<size_t>(last - first), MADV_HUGEPAGE);
#endif
}

int64_t scratch_high_water() { return total.load(std::memory_order_relaxed); }

void reset_scratch_high_water() {
  epoch.fetch_add(1, std::memory_order_relaxed);
  total.store(0, std::memory_order_relaxed);
}

}  // namespace mnv2
