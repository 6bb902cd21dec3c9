// All kernels of an ISA. Included once per ISA, after its simd/f32_*.h.
#pragma once

#include "block-inl.h"
#include "head-inl.h"
#include "maps-inl.h"
#include "moments-inl.h"
#include "peak-inl.h"
#include "table.h"
#include "train_backward-inl.h"
#include "train_channels-inl.h"
#include "train_forward-inl.h"

namespace mnv2 {
namespace {

constexpr KernelTable kernel_table(const char* name) {
  return {
      .name = name,
      .lanes = kLanes,
      .floats =
          {
              .block = &block,
              .reduce = &reduce,
              .stem = &stem,
              .pool = &pool,
              .classify = &classify,
          },
      .training =
          {
              .moments = &moments,
              .linear_moments = &linear_moments,
              .product = &product,
              .map_moments = &map_moments,
              .map_products = &map_products,
              .map_combine = &map_combine,
              .input_backward = &input_backward,
              .expand = &expand,
              .normalise = &normalise,
              .hidden = &hidden,
              .project = &project,
              .project_backward = &project_backward,
              .hidden_backward = &hidden_backward,
              .linear_backward = &linear_backward,
              .input_gradient = &input_gradient,
          },
      .multiply_add = &multiply_add,
      .multiply_add_count = kChains * Vec::kLanes,
  };
}

}  // namespace
}  // namespace mnv2
