// Picks the variant of a kernel by values that are known when it is launched.
#pragma once

#include <iterator>
#include <utility>

#include "block.cuh"
#include "ends.cuh"
#include "layout.h"
#include "pack.cuh"

namespace mnv2 {
namespace cuda {

template <class M, int kTiles, class F>
void with_filter(const BlockArgs& a, F&& f) {
  const bool fixed = a.kernel == 3 && a.dilation == 1;
  if (fixed && a.stride == 1)
    f(block_kernel<M, kTiles, kStride1>);
  else if (fixed && a.stride == 2)
    f(block_kernel<M, kTiles, kStride2>);
  else
    f(block_kernel<M, kTiles, kAnyFilter>);
}

// f(the variant of block_kernel<M> for `a` and `tiles` tiles of output channels).
template <class M, class F>
void with_block_kernel(const BlockArgs& a, int tiles, F&& f) {
  [&]<size_t... i>(std::index_sequence<i...>) {
    (void)((tiles == kColumnTiles[i] && (with_filter<M, kColumnTiles[i]>(a, f), true)) || ...);
  }(std::make_index_sequence<std::size(kColumnTiles)>{});
}

template <class M, class F>
void with_pool_kernel(const PoolArgs& a, F&& f) {
  if (a.together)
    f(pool_kernel<M, true>);
  else
    f(pool_kernel<M, false>);
}

// PyTorch's tf32 setting is one of convolutions: its linear layers stay in fp32.
template <class M>
struct LinearMath {
  using Type = M;
};
template <>
struct LinearMath<FloatMath<false>> {
  using Type = FloatMath<true>;
};

// f(kernel) for all kernels of an arithmetic.
template <class M, class F>
void for_each_kernel(F&& f) {
  [&]<size_t... i>(std::index_sequence<i...>) {
    ((f(block_kernel<M, kColumnTiles[i], kAnyFilter>), f(block_kernel<M, kColumnTiles[i], kStride1>),
      f(block_kernel<M, kColumnTiles[i], kStride2>)),
     ...);
  }(std::make_index_sequence<std::size(kColumnTiles)>{});
  f(pack_kernel<M>);
  f(stem_kernel<M>);
  f(pool_kernel<M, false>);
  f(pool_kernel<M, true>);
  f(classify_kernel<typename LinearMath<M>::Type>);
}

}  // namespace cuda
}  // namespace mnv2
