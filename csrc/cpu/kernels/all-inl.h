// All kernels of an ISA. Included once per ISA, after a vec_*.h.
#pragma once

#include "block-inl.h"
#include "head-inl.h"
#include "peak-inl.h"
#include "train-inl.h"

namespace mnv2 {
namespace {

constexpr KernelTable kernel_table(const char* name) {
  return {
      name,
      kLanes,
      &block,
      &reduce,
      &stem,
      &pool,
      &classify,
      &moments,
      &linear_moments,
      &product,
      &map_moments,
      &map_products,
      &map_combine,
      &input_backward,
      &hidden,
      &project,
      &project_backward,
      &hidden_backward,
      &multiply_add,
      kChains * Vec::kLanes,
  };
}

}  // namespace
}  // namespace mnv2
