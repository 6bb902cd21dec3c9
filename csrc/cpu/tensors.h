// What the CPU operators' files share: threads, memory, and tensors to pointers.
#pragma once

#include <sys/mman.h>

#include "../boundary.h"
#include "dispatch.h"
#include "stages.h"

namespace mnv2 {

inline void parallel_for(int64_t count, const std::function<void(int64_t, int64_t)>& f) {
  torch::stable::parallel_for(0, count, 1, [&f](int64_t begin, int64_t end) { f(begin, end); });
}

// Packed weights of `floats` floats.
inline const float* check_packed_floats(const char* op, const Tensor& packed, int64_t floats) {
  return static_cast<const float*>(check_packed(op, packed, 4 * floats));
}

inline Machine this_machine() { return machine(torch::stable::get_num_threads()); }

inline Tensor empty(const std::vector<int64_t>& sizes, ScalarType dtype, bool channels_last) {
  std::optional<torch::headeronly::MemoryFormat> format;
  if (channels_last) format = torch::headeronly::MemoryFormat::ChannelsLast;
  return torch::stable::empty(sizes, dtype, std::nullopt, std::nullopt, std::nullopt, format);
}

// Asks for huge pages under the whole ones of [data, data + bytes); only advice: may fail.
inline void advise_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr intptr_t kHuge = intptr_t{2} << 20;
  const intptr_t first = round_up(reinterpret_cast<intptr_t>(data), kHuge);
  const intptr_t last = (reinterpret_cast<intptr_t>(data) + bytes) / kHuge * kHuge;
  if (first < last) madvise(reinterpret_cast<void*>(first), static_cast<size_t>(last - first), MADV_HUGEPAGE);
#endif
}

// A channels_last activation. Where it is large it lies in huge pages, which the kernel makes sooner.
inline Tensor new_map(const std::vector<int64_t>& sizes, ScalarType dtype = ScalarType::Float) {
  Tensor map = empty(sizes, dtype, true);
  advise_huge_pages(map.mutable_data_ptr(), map.numel() * (dtype == ScalarType::Float ? 4 : 2));
  return map;
}

}  // namespace mnv2
