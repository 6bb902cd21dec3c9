#include "stages.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <ctime>
#include <thread>
#include <utility>

#ifdef MNV2_FUSED_X86_KERNELS
#include <immintrin.h>
#endif

#include "plan.h"
#include "scratch.h"

namespace mnv2 {
namespace {

// Arithmetic on denormals takes up to a hundred times as long. They are flushed to zero while tasks run.
class FlushDenormals {
#ifdef MNV2_FUSED_X86_KERNELS
 public:
  FlushDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040u); }
  ~FlushDenormals() { _mm_setcsr(saved_); }
  FlushDenormals(const FlushDenormals&) = delete;
  FlushDenormals& operator=(const FlushDenormals&) = delete;

 private:
  unsigned saved_;
#endif
};

// Processor time of the calling thread.
std::chrono::nanoseconds thread_time() {
  timespec t{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return std::chrono::seconds(t.tv_sec) + std::chrono::nanoseconds(t.tv_nsec);
}

void pause_processor() {
#ifdef MNV2_FUSED_X86_KERNELS
  _mm_pause();
#endif
}

// Waits until `done` is at least `count`. Returns the thread_time() of that beyond a moment.
std::chrono::nanoseconds wait_for(const std::atomic<int64_t>& done, int64_t count) {
  constexpr int64_t kSpins = 4096;
  const auto ready = [&] { return done.load(std::memory_order_acquire) >= count; };
  for (int64_t round = 0; round < kSpins; ++round) {
    if (ready()) return {};
    pause_processor();
  }
  const std::chrono::nanoseconds start = thread_time();
  while (!ready()) std::this_thread::yield();
  return thread_time() - start;
}

// A counter in a cache line of its own.
struct alignas(64) Counter {
  std::atomic<int64_t> value{0};
};

// Distributes the tasks of all stages over workers, which may start late or never: a worker begins with its own share
// of a stage, then takes tasks from the shares of others. It waits only for tasks that a running worker has begun. So
// any parallel loop ends, also one that calls the workers one after the other.
class Shares {
 public:
  Shares(const std::vector<Stage>& stages, int64_t workers)
      : stages_(stages),
        workers_(workers),
        begun_(stages.size() * static_cast<size_t>(workers)),
        done_(stages.size()) {}

  // Returns the thread_time() of waiting for others.
  std::chrono::nanoseconds work(int64_t worker, float* scratch) {
    std::chrono::nanoseconds waited{};
    for (size_t s = 0; s < stages_.size(); ++s) {
      const Stage& stage = stages_[s];
      int64_t tasks = 0;
      for (int64_t i = 0; i < workers_; ++i) {
        const int64_t share = (worker + i) % workers_;
        const Range range = part(stage.count, workers_, share);
        std::atomic<int64_t>& begun = begun_[s * static_cast<size_t>(workers_) + static_cast<size_t>(share)].value;
        for (int64_t task; (task = range.first + begun.fetch_add(1, std::memory_order_relaxed)) < range.last; ++tasks) {
          stage.task(task, scratch);
        }
      }
      std::atomic<int64_t>& done = done_[s].value;
      done.fetch_add(tasks, std::memory_order_acq_rel);
      waited += wait_for(done, stage.count);
    }
    return waited;
  }

 private:
  const std::vector<Stage>& stages_;
  const int64_t workers_;
  std::vector<Counter> begun_;  // tasks of a stage and a share
  std::vector<Counter> done_;   // tasks of a stage
};

thread_local Alongside pending{};

}  // namespace

void set_alongside(Alongside alongside) { pending = alongside; }

std::chrono::nanoseconds run_stages(const std::vector<Stage>& stages, int64_t threads, const ParallelFor& parallel) {
  int64_t widest = 0, size = 0;
  for (const Stage& stage : stages) {
    widest = std::max(widest, stage.count);
    size = std::max(size, stage.scratch);
  }
  Alongside alongside = std::exchange(pending, {});
  const auto run_alongside = [&alongside] {
    if (const Alongside now = std::exchange(alongside, {}); now.function) now.function(now.data);
  };
  const int64_t workers = std::min(threads, widest);
  if (workers <= 1) {
    run_alongside();
    [[maybe_unused]] const FlushDenormals flush;
    float* memory = scratch(ScratchUse::kTask, size);
    for (const Stage& stage : stages) {
      for (int64_t i = 0; i < stage.count; ++i) stage.task(i, memory);
    }
    return {};
  }
  Shares shares(stages, workers);
  const std::thread::id caller = std::this_thread::get_id();
  std::atomic<int64_t> all_worked{0};  // nanoseconds
  parallel(workers, [&](int64_t begin, int64_t end) {
    std::chrono::nanoseconds worked = -thread_time();
    if (std::this_thread::get_id() == caller) run_alongside();
    [[maybe_unused]] const FlushDenormals flush;
    float* memory = scratch(ScratchUse::kTask, size);  // before any task is begun: it may throw
    for (int64_t worker = begin; worker < end; ++worker) worked -= shares.work(worker, memory);
    worked += thread_time();
    all_worked.fetch_add(worked.count(), std::memory_order_relaxed);
  });
  run_alongside();  // if the loop did not use the calling thread
  return std::chrono::nanoseconds(all_worked.load(std::memory_order_relaxed));
}

}  // namespace mnv2
