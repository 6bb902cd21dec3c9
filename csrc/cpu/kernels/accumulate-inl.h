// Matrix multiplication over register tiles that sums over pixels: C (m x n) += A' (m x k) B (k x n). Included once per
// ISA.
#pragma once

#include "../plan.h"
#include "multiply-inl.h"

namespace mnv2 {
namespace {

struct AccumulateArgs {
  const float* a;  // (k, m), rows a_row floats apart
  int64_t a_row;
  const float* b;  // (k, whole vectors), rows b_row floats apart
  int64_t b_row;
  int64_t k;
  float* c;  // (m, whole vectors), rows c_row floats apart
  int64_t c_row;
};

// A tile's sum starts from zero and is added to C at the end, so that callers can form long sums in parts.
template <int MR, int NR>
void accumulate_tile(const AccumulateArgs& t, int64_t row, int64_t column) {
  constexpr int L = Vec::kLanes;
  Vec acc[MR][NR];
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < NR; ++n) acc[m][n] = Vec::zero();
  }
  const float* a = t.a + row;
  const float* b = t.b + column;
  for (int64_t k = 0; k < t.k; ++k) {
    Vec bv[NR];
#pragma GCC unroll 4
    for (int n = 0; n < NR; ++n) bv[n] = Vec::load(b + n * L);
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m) {
      const Vec av = Vec::broadcast(a[m]);
#pragma GCC unroll 4
      for (int n = 0; n < NR; ++n) acc[m][n] = fma(av, bv[n], acc[m][n]);
    }
    a += t.a_row;
    b += t.b_row;
  }
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < NR; ++n) {
      float* c = t.c + (row + m) * t.c_row + column + n * L;
      add(Vec::load(c), acc[m][n]).store(c);
    }
  }
}

using AccumulateTile = void (*)(const AccumulateArgs&, int64_t row, int64_t column);

template <int NR, int MR>
constexpr AccumulateTile accumulate_or_null() {
  if constexpr (NR <= Vec::kPanel && MR <= Vec::kRows[NR <= Vec::kPanel ? NR : 0]) {
    return &accumulate_tile<MR, NR>;
  } else {
    return nullptr;
  }
}

#define MNV2_TILES(NR)           \
  {nullptr,                      \
   accumulate_or_null<NR, 1>(),  \
   accumulate_or_null<NR, 2>(),  \
   accumulate_or_null<NR, 3>(),  \
   accumulate_or_null<NR, 4>(),  \
   accumulate_or_null<NR, 5>(),  \
   accumulate_or_null<NR, 6>(),  \
   accumulate_or_null<NR, 7>(),  \
   accumulate_or_null<NR, 8>(),  \
   accumulate_or_null<NR, 9>(),  \
   accumulate_or_null<NR, 10>(), \
   accumulate_or_null<NR, 11>(), \
   accumulate_or_null<NR, 12>(), \
   accumulate_or_null<NR, 13>(), \
   accumulate_or_null<NR, 14>()}

constexpr AccumulateTile kAccumulateTiles[3][kMostRows + 1] = {MNV2_TILES(1), MNV2_TILES(2), MNV2_TILES(3)};
#undef MNV2_TILES

// All m rows and `columns` columns of C, rounded up to whole vectors. `upper`: C is symmetric, and only what lies on or
// above the diagonal is needed.
void accumulate(const AccumulateArgs& t, int64_t m, int64_t columns, bool upper = false) {
  const Panels panels = panels_of(columns, kLanes);
  for (int64_t i = 0; i < panels.count; ++i) {
    const int64_t begin = panel_begin(panels, i), end = panel_begin(panels, i + 1), vectors = end - begin;
    const int64_t rows = upper && end * Vec::kLanes < m ? end * Vec::kLanes : m;
    const int64_t count = divide_up(rows, Vec::kRows[vectors]);
    for (int64_t j = 0; j < count; ++j) {
      const Range tile = part(rows, count, j);
      kAccumulateTiles[vectors - 1][tile.last - tile.first](t, tile.first, begin * Vec::kLanes);
    }
  }
}

// The same, with sums over at most kSummedPixels pixels at a time: long fp32 sums lose digits.
constexpr int64_t kSummedPixels = 128;
void accumulate_in_parts(const AccumulateArgs& t, int64_t m, int64_t columns, bool upper = false) {
  for (int64_t k = 0; k < t.k; k += kSummedPixels) {
    AccumulateArgs p = t;
    p.a += k * t.a_row;
    p.b += k * t.b_row;
    p.k = t.k - k < kSummedPixels ? t.k - k : kSummedPixels;
    accumulate(p, m, columns, upper);
  }
}

}  // namespace
}  // namespace mnv2
