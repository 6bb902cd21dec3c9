// The network's two ends: the dense stem convolution, and the head (1x1 convolution, clamp, mean, classifier).
// Included once per ISA.
#pragma once

#include "block-inl.h"

namespace mnv2 {
namespace {

// One image row as consecutive fp32 pixels, whatever its strides and storage type.
void gather_row(const StemTask& t, int64_t row, float* out) {
  const StemShape& s = *t.shape;
  const int64_t element = dtype_bytes(t.dtype);
  const char* start = static_cast<const char*>(t.x) + row * t.stride_row * element;
  if (t.stride_channel == 1 && t.stride_column == s.c_in && t.dtype == DType::kFloat32) {
    const float* from = reinterpret_cast<const float*>(start);
    for (int64_t i = 0; i < s.w * s.c_in; ++i) out[i] = from[i];
    return;
  }
  for (int64_t c = 0; c < s.c_in; ++c) {
    const char* plane = start + c * t.stride_channel * element;
    if (t.dtype == DType::kFloat32) {
      const float* from = reinterpret_cast<const float*>(plane);
      for (int64_t col = 0; col < s.w; ++col) out[col * s.c_in + c] = from[col * t.stride_column];
    } else {
      for (int64_t col = 0; col < s.w; ++col) {
        out[col * s.c_in + c] = load_element(t.dtype, plane, col * t.stride_column);
      }
    }
  }
}

// A window's row is `kernel` neighbouring pixels, so the convolution is a multiplication whose A has one segment a
// window row and overlapping rows: no im2col.
void stem(const StemTask& t) {
  const StemShape& s = *t.shape;
  const int64_t ring_row = stem_ring_row(s), out_row = w_out(s) * s.c_out;
  const Panels out = panels_of(s.c_out, kLanes);
  const int64_t k = s.kernel * s.c_in;
  float* zeros = t.scratch + s.kernel * ring_row;
  float* narrow_row = zeros + ring_row;
  clear(t.scratch, (s.kernel + 1) * ring_row);

  int64_t next = 0;
  for (int64_t row = t.rows.first; row < t.rows.last; ++row) {
    const int64_t first = row * s.stride - s.pad_top;
    const float* window[63];
    for (int64_t ky = 0; ky < s.kernel; ++ky) {
      const int64_t in = first + ky;
      if (in < 0 || in >= s.h) {
        window[ky] = zeros;
        continue;
      }
      float* slot = t.scratch + in % s.kernel * ring_row;
      if (in >= next) {
        gather_row(t, in, slot + s.pad_left * s.c_in);
        next = in + 1;
      }
      window[ky] = slot;
    }
    float* y = t.dtype == DType::kFloat32 ? static_cast<float*>(t.y) + row * out_row : narrow_row;
    for (int64_t i = 0; i < out.count; ++i) {
      const int64_t begin = panel_begin(out, i), end = panel_begin(out, i + 1);
      const int64_t column = begin * Vec::kLanes, width = (end - begin) * Vec::kLanes;
      MultiplyArgs m{};
      m.a = window;
      m.segments = s.kernel;
      m.k = k;
      m.a_row = s.stride * s.c_in;
      m.bias = t.packed + column * (1 + s.kernel * k);
      m.b = m.bias + width;
      m.c = y + column;
      m.c_row = s.c_out;
      m.last = static_cast<int>((s.c_out < column + width ? s.c_out : column + width) - (end - 1) * Vec::kLanes);
      m.lo = s.lo;
      m.hi = s.hi;
      multiply<Epilogue::kStem>(m, w_out(s), end - begin);
    }
    if (t.dtype != DType::kFloat32) narrow(t.dtype, y, static_cast<uint16_t*>(t.y) + row * out_row, out_row);
  }
}

void pool(const PoolTask& t) {
  const HeadShape& s = *t.shape;
  const Panels last = panels_of(s.c_last, kLanes);
  const int64_t pixels = s.h * s.w;
  const Vec scale = Vec::broadcast(1.f / static_cast<float>(pixels));
  for (int64_t image = t.images.first; image < t.images.last; ++image) {
    const float* a;
    if (t.dtype == DType::kFloat32) {
      a = static_cast<const float*>(t.x) + image * pixels * s.c_in;
    } else {
      widen(t.dtype, static_cast<const uint16_t*>(t.x) + image * pixels * s.c_in, t.scratch, pixels * s.c_in);
      a = t.scratch;
    }
    for (int64_t i = t.panels.first; i < t.panels.last; ++i) {
      const int64_t begin = panel_begin(last, i), vectors = panel_begin(last, i + 1) - begin;
      MultiplyArgs m{};
      m.a = &a;
      m.segments = 1;
      m.k = s.c_in;
      m.a_row = s.c_in;
      m.bias = t.packed + begin * Vec::kLanes * (1 + s.c_in);
      m.b = m.bias + vectors * Vec::kLanes;
      m.c = t.pooled + image * t.pooled_row + begin * Vec::kLanes;
      m.lo = s.lo;
      m.hi = s.hi;
      clear(m.c, vectors * Vec::kLanes);
      multiply<Epilogue::kPool>(m, pixels, vectors);
      for (int64_t v = 0; v < vectors; ++v) mul(Vec::load(m.c + v * Vec::kLanes), scale).store(m.c + v * Vec::kLanes);
    }
  }
}

constexpr int64_t kSumLength = 48;
constexpr float kZeros[Vec::kPanel * Vec::kLanes] = {};

void classify(const ClassifyTask& t) {
  const HeadShape& s = *t.shape;
  const Panels classes = panels_of(s.classes, kLanes);
  const float* weights = t.packed + matrix_size(s.c_in, s.c_last, kLanes);
  const bool fp32 = t.dtype == DType::kFloat32;
  for (int64_t i = t.panels.first; i < t.panels.last; ++i) {
    const int64_t begin = panel_begin(classes, i), end = panel_begin(classes, i + 1);
    const int64_t column = begin * Vec::kLanes, width = (end - begin) * Vec::kLanes;
    const int64_t columns = (s.classes < column + width ? s.classes : column + width) - column;
    MultiplyArgs m{};
    m.segments = 1;
    m.a_row = t.pooled_row;
    m.bias = weights + column * (1 + s.c_last);
    m.c = fp32 ? static_cast<float*>(t.y) + column : t.scratch;
    m.c_row = fp32 ? s.classes : width;
    m.last = static_cast<int>(columns - (width - Vec::kLanes));
    // Long sums are formed in parts, which keeps their rounding error as small as a library's.
    for (int64_t k = 0; k < s.c_last; k += kSumLength) {
      const float* a = t.pooled + k;
      m.a = &a;
      m.k = s.c_last - k < kSumLength ? s.c_last - k : kSumLength;
      m.b = weights + column * (1 + s.c_last) + (1 + k) * width;
      multiply<Epilogue::kProject>(m, s.n, end - begin);
      m.bias = kZeros;
      m.residual = m.c;
    }
    for (int64_t image = 0; image < s.n && !fp32; ++image) {
      narrow(t.dtype, t.scratch + image * width, static_cast<uint16_t*>(t.y) + image * s.classes + column, columns);
    }
  }
}

}  // namespace
}  // namespace mnv2
