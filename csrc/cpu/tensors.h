// Helpers of the CPU operators: threads, memory, and tensors to pointers.
#pragma once

#include "../boundary.h"
#include "dispatch.h"
#include "scratch.h"
#include "stages.h"

namespace mnv2 {

inline void parallel_for(int64_t count, const std::function<void(int64_t, int64_t)>& f) {
  torch::stable::parallel_for(0, count, 1, [&f](int64_t begin, int64_t end) { f(begin, end); });
}

// `packed` must hold `floats` floats; returns them.
inline const float* check_packed_floats(const char* op, const Tensor& packed, int64_t floats) {
  return static_cast<const float*>(check_packed(op, packed, 4 * floats));
}

inline Machine this_machine() { return machine(torch::stable::get_num_threads()); }

inline Tensor empty(const std::vector<int64_t>& sizes, ScalarType dtype, bool channels_last) {
  std::optional<torch::headeronly::MemoryFormat> format;
  if (channels_last) format = torch::headeronly::MemoryFormat::ChannelsLast;
  return torch::stable::empty(sizes, dtype, std::nullopt, std::nullopt, std::nullopt, format);
}

// A channels_last activation. Large ones ask for huge pages, which take less time to fault in.
inline Tensor new_map(const std::vector<int64_t>& sizes, ScalarType dtype = ScalarType::Float) {
  Tensor map = empty(sizes, dtype, true);
  advise_huge_pages(map.mutable_data_ptr(), map.numel() * (dtype == ScalarType::Float ? 4 : 2));
  return map;
}

}  // namespace mnv2
