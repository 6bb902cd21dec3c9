// A thread's scratch memory: grows to the largest request and is reused.
#pragma once

#include <cstdint>

namespace mnv2 {

enum class ScratchUse { kTask, kShared };

// At least `floats` floats, 64-byte aligned, contents undefined; valid until the thread's next call with this use.
float* scratch(ScratchUse use, int64_t floats);

// Bytes of the largest requests since the last reset, summed over threads and uses.
int64_t scratch_high_water();
// A thread that requests nothing afterwards keeps its memory but no longer counts.
void reset_scratch_high_water();

}  // namespace mnv2
