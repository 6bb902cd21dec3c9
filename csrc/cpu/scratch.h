// A thread's scratch memory: grows to the largest request and is reused.
#pragma once

#include <cstdint>

namespace mnv2 {

// kTraining and the uses behind it: one for each train::Slot, and those that the CPU's passes add.
enum class ScratchUse { kTask, kShared, kPacked, kPackedBackward, kScaled, kTraining, kCount = kTraining + 7 };

// At least `floats` floats, 64-byte aligned, contents undefined; valid until the thread's next call with this use.
float* scratch(ScratchUse use, int64_t floats);

// Asks for huge pages in the part of [data, data + bytes) that is aligned to them. The kernel may ignore it.
void advise_huge_pages(void* data, int64_t bytes);

// Bytes of the largest requests since the last reset, summed over threads and uses.
int64_t scratch_high_water();
// A thread that requests nothing afterwards keeps its memory but no longer counts.
void reset_scratch_high_water();

}  // namespace mnv2
