// Means and centred sums over the pixels of maps. Included once per ISA.
#pragma once

#include "accumulate-inl.h"
#include "tasks.h"

namespace mnv2 {
namespace {

// Merges the moments of `pixels` rows of `z` into those of the `before` pixels before them. Deviations are summed
// around the mean so far, so that no digits are lost, however large the mean is.
void add_moments(const float* z, int64_t row, int64_t pixels, int64_t channels, int64_t before, double* mean,
                 double* squares) {
  constexpr int L = Vec::kLanes, kChains = 8;
  for (int64_t channel = 0; channel < channels; channel += L) {
    const int lanes = lanes_from(channel, channels);
    float around[L], sums[L], sums_of_squares[L];
    if (before == 0) {
      load_lanes(z + channel, lanes).store(around);
    } else {
      for (int i = 0; i < L; ++i) around[i] = i < lanes ? static_cast<float>(mean[channel + i]) : 0.f;
    }
    const Vec center = Vec::load(around);
    Vec sum[kChains], square[kChains];
    for (int c = 0; c < kChains; ++c) sum[c] = square[c] = Vec::zero();
    int64_t pixel = 0;
    for (; pixel + kChains <= pixels; pixel += kChains) {
#pragma GCC unroll 8
      for (int c = 0; c < kChains; ++c) {
        const Vec d = sub(load_lanes(z + (pixel + c) * row + channel, lanes), center);
        sum[c] = add(sum[c], d);
        square[c] = fma(d, d, square[c]);
      }
    }
    for (; pixel < pixels; ++pixel) {
      const Vec d = sub(load_lanes(z + pixel * row + channel, lanes), center);
      sum[0] = add(sum[0], d);
      square[0] = fma(d, d, square[0]);
    }
    for (int half = kChains / 2; half > 0; half /= 2) {
      for (int c = 0; c < half; ++c) {
        sum[c] = add(sum[c], sum[c + half]);
        square[c] = add(square[c], square[c + half]);
      }
    }
    sum[0].store(sums);
    square[0].store(sums_of_squares);
    const double count = static_cast<double>(pixels), all = static_cast<double>(before + pixels);
    for (int i = 0; i < lanes; ++i) {
      const double offset = sums[i] / count, old = before == 0 ? 0. : mean[channel + i];
      const double inner = sums_of_squares[i] - offset * sums[i];
      const double delta = around[i] + offset - old;
      mean[channel + i] = old + delta * count / all;
      squares[channel + i] = (before == 0 ? 0. : squares[channel + i] + delta * delta * (all - count) * count / all) +
                             (inner < 0. ? 0. : inner);
    }
  }
}

void map_moments(const MapTask& t) {
  for (int64_t first = t.pixels.first; first < t.pixels.last; first += kMapPixels) {
    const int64_t pixels = t.pixels.last - first < kMapPixels ? t.pixels.last - first : kMapPixels;
    add_moments(t.a + first * t.channels, t.channels, pixels, t.channels, first - t.pixels.first, t.sums[0], t.sums[1]);
  }
}

// A tile of pixels around its own mean, so that rounding does not depend on how large the mean is.
struct CentredTile {
  float* pixels;  // rows `row` floats apart
  int64_t row;
  float* mean;  // (row)
  float* sum;   // (row): over the pixels; zero but for rounding

  void fill(const float* x, int64_t count, int64_t channels) const {
    const Vec scale = Vec::broadcast(1.f / static_cast<float>(count));
    for (int64_t channel = 0; channel < row; channel += Vec::kLanes) {
      const int lanes = lanes_from(channel, channels);
      const Vec start = load_lanes(x + channel, lanes);
      const auto sum_of = [&](auto term) __attribute__((always_inline)) {
        constexpr int kChains = 4;
        Vec chains[kChains];
        for (int i = 0; i < kChains; ++i) chains[i] = Vec::zero();
        int64_t p = 0;
        for (; p + kChains <= count; p += kChains) {
#pragma GCC unroll 4
          for (int i = 0; i < kChains; ++i) chains[i] = add(chains[i], term(p + i));
        }
        for (; p < count; ++p) chains[0] = add(chains[0], term(p));
        return add(add(chains[0], chains[1]), add(chains[2], chains[3]));
      };
      const auto at = [&](int64_t p) { return load_lanes(x + p * channels + channel, lanes); };
      const Vec offset = sum_of([&](int64_t p) { return sub(at(p), start); });
      const Vec center = fma(offset, scale, start);
      const Vec rest = sum_of([&](int64_t p) {
        const Vec d = sub(at(p), center);
        d.store(pixels + p * row + channel);
        return d;
      });
      center.store(mean + channel);
      rest.store(sum + channel);
    }
  }
};

// Lanes of double arithmetic.
typedef double Doubles __attribute__((vector_size(Vec::kLanes * 4)));

// Products in fp64, in blocks of rows and columns that stay in registers. Half of the matrix is written.
void exact_moments(const MomentsTask& t) {
  constexpr int L = Vec::kLanes / 2, kVectors = Vec::kLanes == 16 ? 4 : 2, kRows = 4, kColumns = L * kVectors;
  const int64_t c = t.channels, row = round_up(c, kColumns);
  double* const tile = reinterpret_cast<double*>(t.scratch);
  double* const sums = tile + kExactPixels * row;
  const float* const pivot = t.x + t.pixels.first * c;  // so that no digits are lost if means are large
  for (int64_t i = 0; i < row; ++i) sums[i] = 0.;
  for (int64_t i = 0; i < kExactPixels * row; ++i) tile[i] = 0.;
  for (int64_t i = 0; i < c * c; ++i) t.products[i] = 0.;
  for (int64_t first = t.pixels.first; first < t.pixels.last; first += kExactPixels) {
    const int64_t pixels = t.pixels.last - first < kExactPixels ? t.pixels.last - first : kExactPixels;
    for (int64_t p = 0; p < pixels; ++p) {
      for (int64_t i = 0; i < c; ++i) {
        tile[p * row + i] = static_cast<double>(t.x[(first + p) * c + i]) - static_cast<double>(pivot[i]);
        sums[i] += tile[p * row + i];
      }
    }
    for (int64_t column = 0; column < row; column += kColumns) {
      const int64_t last = column + kColumns < c ? column + kColumns : c;
      for (int64_t i = 0; i < last; i += kRows) {
        Doubles sum[kRows][kVectors] = {};
        for (int64_t p = 0; p < pixels; ++p) {
          const double* const at = tile + p * row;
#pragma GCC unroll 4
          for (int v = 0; v < kVectors; ++v) {
            Doubles block;
            __builtin_memcpy(&block, at + column + v * L, sizeof(block));
#pragma GCC unroll 4
            for (int r = 0; r < kRows; ++r) sum[r][v] += block * at[i + r];
          }
        }
        for (int r = 0; r < kRows && i + r < last; ++r) {
          for (int64_t j = column; j < last; ++j) {
            t.products[(i + r) * c + j] += sum[r][(j - column) / L][(j - column) % L];
          }
        }
      }
    }
  }
  const double count = static_cast<double>(t.pixels.last - t.pixels.first);
  for (int64_t i = 0; i < c; ++i) {
    t.mean[i] = pivot[i] + sums[i] / count;
    for (int64_t j = i; j < c; ++j) t.products[i * c + j] -= sums[i] * sums[j] / count;
  }
}

void moments(const MomentsTask& t) {
  if (t.exact) return exact_moments(t);
  const int64_t c = t.channels, row = moments_row(c, kLanes);
  float* const products = t.scratch + kMomentsPixels * row;
  float* const vectors = products + row * row;
  const CentredTile tile{.pixels = t.scratch, .row = row, .mean = vectors, .sum = vectors + row};
  double* const delta = reinterpret_cast<double*>(vectors + 2 * row);
  for (int64_t i = 0; i < c; ++i) t.mean[i] = 0.;
  for (int64_t i = 0; i < c * c; ++i) t.products[i] = 0.;
  int64_t before = 0;
  for (int64_t first = t.pixels.first; first < t.pixels.last; first += kMomentsPixels) {
    const int64_t pixels = t.pixels.last - first < kMomentsPixels ? t.pixels.last - first : kMomentsPixels;
    tile.fill(t.x + first * c, pixels, c);
    clear(products, row * row);
    accumulate_in_parts(
        {.a = tile.pixels, .a_row = row, .b = tile.pixels, .b_row = row, .k = pixels, .c = products, .c_row = row}, c,
        c, true);
    const double count = static_cast<double>(pixels), all = static_cast<double>(before + pixels);
    for (int64_t i = 0; i < c; ++i) {
      delta[i] = tile.mean[i] + tile.sum[i] / count - t.mean[i];
      t.mean[i] += delta[i] * count / all;
    }
    for (int64_t i = 0; i < c; ++i) {
      const double between = delta[i] * static_cast<double>(before) * count / all, inner = tile.sum[i] / count;
      for (int64_t j = i; j < c; ++j) {
        t.products[i * c + j] += products[i * row + j] - inner * tile.sum[j] + between * delta[j];
      }
    }
    before += pixels;
  }
}

// The quadratic form of a symmetric matrix, in blocks of columns that stay in registers. Half of the matrix is read.
void linear_moments(const LinearMomentsTask& t) {
  constexpr int L = Vec::kLanes / 2, kVectors = Vec::kLanes == 16 ? 4 : 2, kRows = 4, kColumns = L * kVectors;
  const int64_t c = t.channels;
  for (int64_t row = t.rows.first; row < t.rows.last; row += kRows) {
    const int64_t rows = t.rows.last - row < kRows ? t.rows.last - row : kRows;
    const float* w[kRows];
    for (int r = 0; r < kRows; ++r) w[r] = t.weight + (row + (r < rows ? r : 0)) * c;
    double mean[kRows] = {}, form[kRows] = {}, diagonal[kRows] = {};
    for (int64_t i = 0; i < c; ++i) {
      for (int r = 0; r < kRows; ++r) {
        const double weight = w[r][i];
        mean[r] += weight * t.mean[i];
        diagonal[r] += weight * weight * t.products[i * c + i];
      }
    }
    for (int64_t first = 0; first < c; first += kColumns) {
      const int64_t columns = c - first < kColumns ? c - first : kColumns;
      Doubles sum[kRows][kVectors] = {};
      const auto add_row = [&](int64_t i, double factor) __attribute__((always_inline)) {
        const double* from = t.products + i * c + first;
        double rest[kColumns] = {};
        if (columns < kColumns) {
          for (int64_t j = 0; j < columns; ++j) rest[j] = from[j];
          from = rest;
        }
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          Doubles block;
          __builtin_memcpy(&block, from + v * L, sizeof(block));
#pragma GCC unroll 4
          for (int r = 0; r < kRows; ++r) sum[r][v] += block * (w[r][i] * factor);
        }
      };
      for (int64_t i = 0; i < first; ++i) add_row(i, 2.);
      for (int64_t i = first; i < first + columns; ++i) add_row(i, 1.);
      for (int r = 0; r < kRows; ++r) {
        for (int64_t j = 0; j < columns; ++j) form[r] += sum[r][j / L][j % L] * w[r][first + j];
      }
    }
    for (int r = 0; r < rows; ++r) {
      t.out_mean[row + r] = mean[r];
      t.out_squares[row + r] = form[r] < 0. ? 0. : form[r];
      t.uncorrelated[row + r] = diagonal[r];
    }
  }
}

}  // namespace
}  // namespace mnv2
