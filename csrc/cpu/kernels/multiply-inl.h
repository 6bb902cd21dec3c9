// Matrix multiplication over register tiles: C (m x n) = A (m x k) B (k x n), A read by broadcast from rows of pixels,
// B from a packed panel (see layout.h). Included once per ISA.
#pragma once

#include "lanes-inl.h"

namespace mnv2 {
namespace {

// Memory that is read next. Multiplications prefetch a cache line of it for every step: a network's weights stay
// neither in the L1 cache nor in the L2 cache, and the images of a batch are in none.
struct Ahead {
  const char* at;
  const char* end;

  Ahead() : at(nullptr), end(nullptr) {}
  Ahead(const float* first, int64_t count)
      : at(reinterpret_cast<const char*>(first)), end(reinterpret_cast<const char*>(first + count)) {}
  // `ranges` ranges of `bytes` bytes, `step` bytes from one to the next.
  Ahead(const void* first, int64_t bytes, int64_t ranges, int64_t step)
      : at(static_cast<const char*>(first)), end(at + bytes), begin_(at), step_(step), more_(ranges - 1) {}

  // Whether anything is left from `at` on.
  bool any() {
    if (at >= end && more_ > 0) --more_, at = begin_ += step_, end += step_;
    return at < end;
  }

 private:
  const char* begin_ = nullptr;
  int64_t step_ = 0, more_ = 0;
};

struct MultiplyArgs {
  const float* const* a;  // `segments` pointers to the first row; row m starts a_row * m floats on
  int64_t segments;       // k is the segments' elements one after the other; only kStem has more than one
  int64_t k;              // elements of a segment
  int64_t a_row;
  const float* b;     // panel: segments * k rows of NR vectors
  const float* bias;  // NR vectors
  float* c;           // row m starts c_row * m floats on
  int64_t c_row;
  int last;               // columns in the panel's last vector
  const float* start;     // kProject: the sum starts from this instead of bias, in c's layout; or null
  const float* before;    // added to the sum of products, in c's layout; or null
  const float* residual;  // added to c, in c's layout; or null
  bool clamps;            // kProject: clamps the sum, residual included
  const float* shortcut;  // kProject: added at the end, in c's layout; or null
  float lo, hi;
  Ahead* ahead;  // or null
};

constexpr float kNoBias[Vec::kPanel * Vec::kLanes] = {};

enum class Epilogue {
  kExpand,   // clamp; whole vectors are written, zeros of the padding included
  kProject,  // add residual, clamp if asked to, add shortcut
  kStem,     // clamp, as many columns as count
  kPool,     // clamp, then add all rows to the one row at c
};

// start_tile(), sum_tile(), finish_tile() and its helpers compute a tile of MR x NR vectors. They are inlined into
// multiply_tile(), so that `acc` stays in registers.

template <Epilogue E, int MR, int NR, int Last>
__attribute__((always_inline)) inline void start_tile(const MultiplyArgs& t, int64_t row, Vec (&acc)[MR][NR]) {
  constexpr int L = Vec::kLanes;
  if (E == Epilogue::kProject && t.start) {
    const float* start = t.start + row * t.c_row;
    const int last = Last > 0 ? Last : t.last;
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 4
      for (int n = 0; n + 1 < NR; ++n) acc[m][n] = Vec::load(start + m * t.c_row + n * L);
      acc[m][NR - 1] = load_lanes(start + m * t.c_row + (NR - 1) * L, last);
    }
  } else {
#pragma GCC unroll 4
    for (int n = 0; n < NR; ++n) {
      const Vec bias = Vec::load(t.bias + n * L);
#pragma GCC unroll 16
      for (int m = 0; m < MR; ++m) acc[m][n] = bias;
    }
  }
}

// Adds the products. With `fetch`, prefetches a cache line for every step, from `ahead` on; returns where that ended.
template <Epilogue E, int MR, int NR, int Last, bool fetch>
__attribute__((always_inline)) inline const char* sum_tile(const MultiplyArgs& t, int64_t row, Vec (&acc)[MR][NR],
                                                           const char* ahead) {
  constexpr int L = Vec::kLanes;
  constexpr bool kLow = Last > 0 && Last <= Vec::kLowLanes;
  constexpr int kBases = (MR + 2) / 3;
  const float* b = t.b;
  const int64_t a_row = t.a_row;
  const int64_t segments = E == Epilogue::kStem ? t.segments : 1;
  for (int64_t s = 0; s < segments; ++s) {
    // One base for three rows: base, base + row, base + 2 row are addressing modes, so few registers are needed.
    const float* base[kBases];
#pragma GCC unroll 8
    for (int g = 0; g < kBases; ++g) base[g] = t.a[s] + (row + 3 * g) * a_row;
    for (int64_t k = 0; k < t.k; ++k) {
      Vec bv[NR];
#pragma GCC unroll 4
      for (int n = 0; n < NR; ++n) bv[n] = Vec::load(b + n * L);
#pragma GCC unroll 16
      for (int m = 0; m < MR; ++m) {
        const float* const a = &base[m / 3][(m % 3) * a_row];
#pragma GCC unroll 4
        for (int n = 0; n < NR; ++n) {
          acc[m][n] = kLow && n + 1 == NR ? fma_low(a, bv[n], acc[m][n]) : fma(Vec::broadcast(*a), bv[n], acc[m][n]);
        }
      }
      b += NR * L;
      if (fetch) __builtin_prefetch(ahead), ahead += 64;
#pragma GCC unroll 8
      for (int g = 0; g < kBases; ++g) {
        ++base[g];
        asm("" : "+r"(base[g]));  // keeps the compiler from giving every row a pointer of its own
      }
    }
  }
  return ahead;
}

template <int MR, int NR>
__attribute__((always_inline)) inline void clamp_rows(const MultiplyArgs& t, Vec (&acc)[MR][NR]) {
  const Vec lo = Vec::broadcast(t.lo), hi = Vec::broadcast(t.hi);
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < NR; ++n) acc[m][n] = clamp(acc[m][n], lo, hi);
  }
}

// Adds rows that lie as those of c.
template <int MR, int NR, int Last>
__attribute__((always_inline)) inline void add_rows(const MultiplyArgs& t, const float* rows, Vec (&acc)[MR][NR]) {
  constexpr int L = Vec::kLanes;
  const int last = Last > 0 ? Last : t.last;
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n + 1 < NR; ++n) acc[m][n] = add(acc[m][n], Vec::load(rows + m * t.c_row + n * L));
    acc[m][NR - 1] = add(acc[m][NR - 1], load_lanes(rows + m * t.c_row + (NR - 1) * L, last));
  }
}

template <Epilogue E, int MR, int NR, int Last>
__attribute__((always_inline)) inline void finish_tile(const MultiplyArgs& t, int64_t row, Vec (&acc)[MR][NR]) {
  constexpr int L = Vec::kLanes;
  float* c = t.c + (E == Epilogue::kPool ? 0 : row * t.c_row);
  if (E != Epilogue::kPool && t.before) add_rows<MR, NR, Last>(t, t.before + row * t.c_row, acc);
  if (E != Epilogue::kProject) clamp_rows(t, acc);
  if (E == Epilogue::kPool) {
#pragma GCC unroll 4
    for (int n = 0; n < NR; ++n) {
      Vec sum = acc[0][n];
#pragma GCC unroll 16
      for (int m = 1; m < MR; ++m) sum = add(sum, acc[m][n]);
      add(Vec::load(c + n * L), sum).store(c + n * L);
    }
    return;
  }
  if (E == Epilogue::kProject && t.residual) add_rows<MR, NR, Last>(t, t.residual + row * t.c_row, acc);
  if (E == Epilogue::kProject && t.clamps) clamp_rows(t, acc);
  if (E == Epilogue::kProject && t.shortcut) add_rows<MR, NR, Last>(t, t.shortcut + row * t.c_row, acc);
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n + 1 < NR; ++n) acc[m][n].store(c + m * t.c_row + n * L);
    const int last = Last > 0 ? Last : t.last;
    store_lanes(acc[m][NR - 1], c + m * t.c_row + (NR - 1) * L, last);
  }
}

// Rows [row, end) in tiles of MR. `Last`: how many columns of the last vector count; 0: t.last of them.
template <Epilogue E, int MR, int NR, int Last>
void multiply_tile(const MultiplyArgs& t, int64_t row, int64_t end) {
  for (; row < end; row += MR) {
    Vec acc[MR][NR];
    start_tile<E, MR, NR, Last>(t, row, acc);
    if (t.ahead && t.ahead->any()) {
      t.ahead->at = sum_tile<E, MR, NR, Last, true>(t, row, acc, t.ahead->at);
    } else {
      sum_tile<E, MR, NR, Last, false>(t, row, acc, nullptr);
    }
    finish_tile<E, MR, NR, Last>(t, row, acc);
  }
}

using MultiplyTile = void (*)(const MultiplyArgs&, int64_t row, int64_t end);
constexpr int kMostRows = 14;

// Null if the tile does not fit into the ISA's registers.
template <Epilogue E, int Last, int NR, int MR>
constexpr MultiplyTile tile_or_null() {
  if constexpr (NR <= Vec::kPanel && MR <= Vec::kRows[NR <= Vec::kPanel ? NR : 0]) {
    return &multiply_tile<E, MR, NR, Last>;
  } else {
    return nullptr;
  }
}

#define MNV2_TILES(NR)              \
  {nullptr,                         \
   tile_or_null<E, Last, NR, 1>(),  \
   tile_or_null<E, Last, NR, 2>(),  \
   tile_or_null<E, Last, NR, 3>(),  \
   tile_or_null<E, Last, NR, 4>(),  \
   tile_or_null<E, Last, NR, 5>(),  \
   tile_or_null<E, Last, NR, 6>(),  \
   tile_or_null<E, Last, NR, 7>(),  \
   tile_or_null<E, Last, NR, 8>(),  \
   tile_or_null<E, Last, NR, 9>(),  \
   tile_or_null<E, Last, NR, 10>(), \
   tile_or_null<E, Last, NR, 11>(), \
   tile_or_null<E, Last, NR, 12>(), \
   tile_or_null<E, Last, NR, 13>(), \
   tile_or_null<E, Last, NR, 14>()}

template <Epilogue E, int Last>
struct Tiles {
  static constexpr MultiplyTile kTable[3][kMostRows + 1] = {MNV2_TILES(1), MNV2_TILES(2), MNV2_TILES(3)};
};
#undef MNV2_TILES

// By vectors and rows, for panels whose last vector has `last` columns. Whole and half vectors take no masks.
template <Epilogue E>
auto tiles_of(int last) {
  if constexpr (E == Epilogue::kProject || E == Epilogue::kStem) {
    if (Vec::kLowLanes > 0 && last == Vec::kLowLanes) return Tiles<E, Vec::kLowLanes>::kTable;
    if (last != Vec::kLanes) return Tiles<E, 0>::kTable;
  }
  return Tiles<E, Vec::kLanes>::kTable;
}

// All `rows` rows against one panel of `vectors` vectors, in tiles of nearly equal height.
template <Epilogue E>
void multiply_whole(const MultiplyArgs& t, int64_t rows, int64_t vectors) {
  const MultiplyTile* tiles = tiles_of<E>(t.last)[vectors - 1];
  const int64_t count = divide_up(rows, Vec::kRows[vectors]);
  if (count == 0) return;
  const int64_t height = rows / count, split = (height + 1) * (rows % count);  // the higher tiles come first
  if (split > 0) tiles[height + 1](t, 0, split);
  tiles[height](t, split, rows);
}

// Products in a row that one sum takes: a long sum in fp32 loses digits. Sums of more are added up part by part.
constexpr int64_t kLongestSum = 192;

// The same, part by part. A residual may lie where c does, so it leaves no place for sums of parts.
template <Epilogue E>
void multiply(const MultiplyArgs& t, int64_t rows, int64_t vectors) {
  const bool whole = E == Epilogue::kPool || t.segments > 1 || t.residual || t.k <= kLongestSum;
  if (whole) return multiply_whole<E>(t, rows, vectors);
  const int64_t parts = divide_up(t.k, kLongestSum);
  for (int64_t i = 0; i < parts; ++i) {
    const int64_t begin = t.k * i / parts;
    const float* const a = t.a[0] + begin;
    MultiplyArgs m = t;
    m.a = &a;
    m.k = t.k * (i + 1) / parts - begin;
    m.b = t.b + begin * vectors * Vec::kLanes;
    if (i > 0) m.start = nullptr, m.bias = kNoBias, m.before = t.c;
    if (i + 1 == parts) return multiply_whole<E>(m, rows, vectors);
    m.shortcut = nullptr;
    m.clamps = false;
    multiply_whole<Epilogue::kProject>(m, rows, vectors);
  }
}

// All `rows` rows against the panels of all `columns` columns. t's b, bias, start, before, c, residual and shortcut
// point to column 0; a null bias means zeros.
void multiply_panels(const MultiplyArgs& t, int64_t rows, int64_t columns) {
  const Panels panels = panels_of(columns, kLanes);
  for (int64_t i = 0; i < panels.count; ++i) {
    const int64_t begin = panel_begin(panels, i), end = panel_begin(panels, i + 1);
    const int64_t column = begin * Vec::kLanes, width = (end - begin) * Vec::kLanes;
    MultiplyArgs m = t;
    m.b = t.b + column * t.segments * t.k;
    m.bias = t.bias ? t.bias + column : kNoBias;
    m.c = t.c + column;
    m.last = static_cast<int>((columns < column + width ? columns : column + width) - (end - 1) * Vec::kLanes);
    m.start = t.start ? t.start + column : nullptr;
    m.before = t.before ? t.before + column : nullptr;
    m.residual = t.residual ? t.residual + column : nullptr;
    m.shortcut = t.shortcut ? t.shortcut + column : nullptr;
    multiply<Epilogue::kProject>(m, rows, end - begin);
  }
}

}  // namespace
}  // namespace mnv2
