// Work in stages on several threads: the tasks of a stage run at the same time, the stages one after the other.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <vector>

namespace mnv2 {

struct Stage {
  int64_t count;    // tasks
  int64_t scratch;  // floats of scratch that a task needs
  std::function<void(int64_t i, float* scratch)> task;
};

// Calls the function with ranges that together cover [0, count), on any threads, and returns when all are done.
using ParallelFor = std::function<void(int64_t count, const std::function<void(int64_t begin, int64_t end)>&)>;

// A function that the calling thread runs first in its next run_stages(), while other threads begin with the tasks. It
// must not throw.
struct Alongside {
  void (*function)(void*);
  void* data;
};
void set_alongside(Alongside alongside);

// Runs all stages in one parallel loop. Tasks must not throw. Returns the processor time in which the threads worked,
// not waited; zero if the calling thread was alone.
std::chrono::nanoseconds run_stages(const std::vector<Stage>& stages, int64_t threads, const ParallelFor& parallel);

}  // namespace mnv2
