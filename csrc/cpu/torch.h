// What the CPU operators' files share: threads, memory, and tensors to pointers.
#pragma once

#include "../check.h"
#include "dispatch.h"
#include "stages.h"

namespace mnv2 {

using OptionalTensor = std::optional<Tensor>;

inline void parallel_for(int64_t count, const std::function<void(int64_t, int64_t)>& f) {
  torch::stable::parallel_for(0, count, 1, [&f](int64_t begin, int64_t end) { f(begin, end); });
}

inline Machine this_machine() { return machine(torch::stable::get_num_threads()); }

inline Tensor empty(const std::vector<int64_t>& sizes, ScalarType dtype, bool channels_last) {
  std::optional<torch::headeronly::MemoryFormat> format;
  if (channels_last) format = torch::headeronly::MemoryFormat::ChannelsLast;
  return torch::stable::empty(sizes, dtype, std::nullopt, std::nullopt, std::nullopt, format);
}

}  // namespace mnv2
