// The passes over narrow maps and over matrices of weights: sums, affine maps, products. Included once per ISA.
#pragma once

#include "accumulate-inl.h"
#include "tasks.h"

namespace mnv2 {
namespace {

void product(const ProductTask& t) {
  const int64_t rows = t.range.last - t.range.first;
  float* const c = t.c + t.range.first * t.row;
  clear(c, rows * t.row);
  accumulate_in_parts(
      {.a = t.a + t.range.first, .a_row = t.rows, .b = t.b, .b_row = t.row, .k = t.k, .c = c, .c_row = t.row}, rows,
      t.columns);
}

// Adds the sums over `pixels` rows of dy, and of dy * (x - mean), to `sums`; rows are `row` floats apart.
void add_products(const float* dy, const float* x, int64_t row, const float* mean, int64_t pixels, int64_t channels,
                  double* const sums[2]) {
  for (int64_t channel = 0; channel < channels; channel += Vec::kLanes) {
    const int lanes = lanes_from(channel, channels);
    const Vec m = load_lanes(mean + channel, lanes);
    constexpr int kChains = 4;
    Vec sum[kChains], centred[kChains];
    for (int c = 0; c < kChains; ++c) sum[c] = centred[c] = Vec::zero();
    const auto add_pixel = [&](int64_t pixel, int chain) __attribute__((always_inline)) {
      const int64_t at = pixel * row + channel;
      const Vec v = load_lanes(dy + at, lanes);
      sum[chain] = add(sum[chain], v);
      centred[chain] = fma(v, sub(load_lanes(x + at, lanes), m), centred[chain]);
    };
    int64_t pixel = 0;
    for (; pixel + kChains <= pixels; pixel += kChains) {
#pragma GCC unroll 4
      for (int c = 0; c < kChains; ++c) add_pixel(pixel + c, c);
    }
    for (; pixel < pixels; ++pixel) add_pixel(pixel, 0);
    float sum_dy[Vec::kLanes], sum_dy_centred[Vec::kLanes];
    add(add(sum[0], sum[1]), add(sum[2], sum[3])).store(sum_dy);
    add(add(centred[0], centred[1]), add(centred[2], centred[3])).store(sum_dy_centred);
    for (int i = 0; i < lanes; ++i) {
      sums[0][channel + i] += sum_dy[i];
      sums[1][channel + i] += sum_dy_centred[i];
    }
  }
}

void map_products(const MapTask& t) {
  for (int64_t i = 0; i < t.channels; ++i) t.sums[0][i] = t.sums[1][i] = 0.;
  for (int64_t first = t.pixels.first; first < t.pixels.last; first += kMapPixels) {
    const int64_t pixels = t.pixels.last - first < kMapPixels ? t.pixels.last - first : kMapPixels;
    const int64_t at = first * t.channels;
    add_products(t.a + at, t.b + at, t.channels, t.shift, pixels, t.channels, t.sums);
  }
}

void map_combine(const MapTask& t) {
  for (int64_t pixel = t.pixels.first; pixel < t.pixels.last; ++pixel) {
    for (int64_t channel = 0; channel < t.channels; channel += Vec::kLanes) {
      const int lanes = lanes_from(channel, t.channels);
      const int64_t at = pixel * t.channels + channel;
      const auto load = [=](const float* p) { return load_lanes(p, lanes); };
      Vec v = fma(load(t.a + at), load(t.scale[0] + channel), load(t.shift + channel));
      if (t.b) v = fma(load(t.b + at), load(t.scale[1] + channel), v);
      if (t.c) v = add(v, load(t.c + at));
      store_lanes(v, t.out + at, lanes);
    }
  }
}

void input_backward(const InputGradientTask& t) {
  const int64_t c = t.channels, row = c + 1;
  for (int64_t first = t.pixels.first; first < t.pixels.last; first += kInputGradientPixels) {
    const int64_t rest = t.pixels.last - first, pixels = rest < kInputGradientPixels ? rest : kInputGradientPixels;
    for (int64_t p = 0; p < pixels; ++p) {  // x with a column of ones for the vector
      for (int64_t channel = 0; channel < c; channel += Vec::kLanes) {
        const int lanes = lanes_from(channel, c);
        store_lanes(load_lanes(t.x + (first + p) * c + channel, lanes), t.scratch + p * row + channel, lanes);
      }
      t.scratch[p * row + c] = 1.f;
    }
    const float* x = t.scratch;
    MultiplyArgs m{};
    m.a = &x;
    m.segments = 1;
    m.k = row;
    m.a_row = row;
    m.b = t.packed;
    m.c = t.out + first * c;
    m.c_row = c;
    m.residual = t.a + first * c;  // added last, so that the correction, which is smaller, is summed by itself
    multiply_panels(m, pixels, c);
    if (!t.residual) continue;
    for (int64_t i = first * c; i < (first + pixels) * c; i += Vec::kLanes) {
      const int lanes = lanes_from(i, (first + pixels) * c);
      store_lanes(add(load_lanes(t.out + i, lanes), load_lanes(t.residual + i, lanes)), t.out + i, lanes);
    }
  }
}

}  // namespace
}  // namespace mnv2
