// Whether other work on the same processors makes parallel loops slower than one thread. Torch-free.
#pragma once

#include <chrono>

#include "../api.h"

namespace mnv2 {

// A loop ends when its last worker does. If the system gives a worker's processor to other work, all wait for it for
// milliseconds, many times what a small network takes. True while inference should use the calling thread alone: as
// soon as its loops have lost more time than they have won, for 10 ms at first, then four times as long each time, 10 s
// at most. The passes of training do not ask: PyTorch's own parallel loops between them lose that time anyway.
MNV2_FUSED_API bool crowded();

// Tells of a parallel loop that took `took`, and would have taken about `alone` on the calling thread alone.
MNV2_FUSED_API void parallel_loop_took(std::chrono::nanoseconds took, std::chrono::nanoseconds alone);

// Forgets all loops. Unless `watch`, crowded() stays false from now on. For tests.
MNV2_FUSED_API void watch_crowding(bool watch);

}  // namespace mnv2
