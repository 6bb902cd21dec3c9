// The head: 1x1 convolution, clamp, mean, classifier. Included once per ISA.
#pragma once

#include "multiply-inl.h"
#include "storage-inl.h"
#include "tasks.h"

namespace mnv2 {
namespace {

void pool(const PoolTask& t) {
  const HeadShape& s = *t.shape;
  const Panels last = panels_of(s.c_last, kLanes);
  const int64_t pixels = s.h * s.w, image = pixels * s.c_in, first = t.images.first;
  const Vec scale = Vec::broadcast(1.f / static_cast<float>(pixels));
  const float* x = read(at(t.x, first * image), (t.images.last - first) * image, t.scratch);
  const float* weights = weights_of(t.packed);
  // Behind the panels lie the classifier's weights, which are read next.
  const int64_t next = panel_begin(last, t.panels.first + 1) * Vec::kLanes * (1 + s.c_in);
  Ahead ahead{weights + next, head_size(s.c_in, s.c_last, s.classes, kLanes) - next};
  for (int64_t i = t.panels.first; i < t.panels.last; ++i) {
    const int64_t begin = panel_begin(last, i), vectors = panel_begin(last, i + 1) - begin;
    for (int64_t n = first; n < t.images.last; ++n) {
      const float* a = x + (n - first) * image;
      MultiplyArgs m{};
      m.a = &a;
      m.segments = 1;
      m.k = s.c_in;
      m.a_row = s.c_in;
      m.bias = weights + begin * Vec::kLanes * (1 + s.c_in);
      m.b = m.bias + vectors * Vec::kLanes;
      m.c = t.pooled + n * t.pooled_row + begin * Vec::kLanes;
      m.lo = s.act.lo;
      m.hi = s.act.hi;
      m.ahead = &ahead;
      clear(m.c, vectors * Vec::kLanes);
      multiply<Epilogue::kPool>(m, pixels, vectors);
      for (int64_t v = 0; v < vectors; ++v) mul(Vec::load(m.c + v * Vec::kLanes), scale).store(m.c + v * Vec::kLanes);
    }
  }
}

constexpr int64_t kSumLength = 48;

void classify(const ClassifyTask& t) {
  const HeadShape& s = *t.shape;
  const Panels classes = panels_of(s.classes, kLanes);
  const float* weights = weights_of(t.packed) + matrix_size(s.c_in, s.c_last, kLanes);
  for (int64_t i = t.panels.first; i < t.panels.last; ++i) {
    const int64_t begin = panel_begin(classes, i), end = panel_begin(classes, i + 1);
    const int64_t column = begin * Vec::kLanes, width = (end - begin) * Vec::kLanes;
    const int64_t columns = (s.classes < column + width ? s.classes : column + width) - column;
    const Draft y(at(t.y, column), s.classes, t.scratch, width);
    // Each tile of images reads the panel as one stream, which is faster than to use its parts for all images.
    const int64_t tiles = divide_up(s.n, Vec::kRows[end - begin]);
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const Range images = part(s.n, tiles, tile);
      MultiplyArgs m{};
      m.segments = 1;
      m.a_row = t.pooled_row;
      m.bias = weights + column * (1 + s.c_last);
      m.c = y.data + images.first * y.row;
      m.c_row = y.row;
      m.last = static_cast<int>(columns - (width - Vec::kLanes));
      // Long sums are formed in parts, which keeps their rounding error as small as a library's.
      for (int64_t k = 0; k < s.c_last; k += kSumLength) {
        const float* a = t.pooled + images.first * t.pooled_row + k;
        m.a = &a;
        m.k = s.c_last - k < kSumLength ? s.c_last - k : kSumLength;
        m.b = weights + column * (1 + s.c_last) + (1 + k) * width;
        multiply<Epilogue::kProject>(m, images.last - images.first, end - begin);
        m.bias = kNoBias;
        m.residual = m.c;
      }
    }
    y.finish(columns, s.n);
  }
}

}  // namespace
}  // namespace mnv2
