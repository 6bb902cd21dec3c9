#include "crowding.h"

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace mnv2 {
namespace {

constexpr int64_t kMillisecond = 1000000;
constexpr int64_t kLeastPause = 10 * kMillisecond, kMostPause = 10000 * kMillisecond;
// What loops may lose before a pause: a few slices of the scheduler; right after a pause only what it takes to wake the
// workers. Loops that have won the whole credit make the next pause short again.
constexpr int64_t kCredit = 20 * kMillisecond, kCreditAfterPause = kMillisecond;

// Of the process, because all its threads share the processors; in nanoseconds. If two threads write at the same time,
// one loop is forgotten.
std::atomic<int64_t> credit{kCredit};
std::atomic<int64_t> pause{0};      // the last one
std::atomic<int64_t> pause_end{0};  // on the steady clock
std::atomic<bool> watching{true};

int64_t now() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

}  // namespace

bool crowded() {
  const int64_t end = pause_end.load(std::memory_order_relaxed);
  return end > 0 && now() < end;
}

void parallel_loop_took(std::chrono::nanoseconds took, std::chrono::nanoseconds alone) {
  if (!watching.load(std::memory_order_relaxed)) return;
  const int64_t left = credit.load(std::memory_order_relaxed) + (alone - took).count();
  if (left >= 0) {
    credit.store(std::min(left, kCredit), std::memory_order_relaxed);
    if (left >= kCredit) pause.store(0, std::memory_order_relaxed);
    return;
  }
  const int64_t next = std::clamp(4 * pause.load(std::memory_order_relaxed), kLeastPause, kMostPause);
  pause.store(next, std::memory_order_relaxed);
  credit.store(kCreditAfterPause, std::memory_order_relaxed);
  pause_end.store(now() + next, std::memory_order_relaxed);
}

void watch_crowding(bool watch) {
  watching = watch;
  credit = kCredit;
  pause = pause_end = 0;
}

}  // namespace mnv2
