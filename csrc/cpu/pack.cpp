#include "pack.h"

#include <algorithm>

namespace mnv2 {
namespace {

// Panels of the K x N matrix element(k, n); the bias, where there is one, is row 0 of every panel.
template <class Element>
void pack_matrix(int64_t rows, int64_t columns, Lanes lanes, const float* bias, Element element, float* packed) {
  const Panels panels = panels_of(columns, lanes);
  for (int64_t i = 0; i < panels.count; ++i) {
    const int64_t begin = panel_begin(panels, i) * lanes.lanes, end = panel_begin(panels, i + 1) * lanes.lanes;
    for (int64_t k = bias ? -1 : 0; k < rows; ++k) {
      for (int64_t n = begin; n < end; ++n) *packed++ = n >= columns ? 0.f : k < 0 ? bias[n] : element(k, n);
    }
  }
}

}  // namespace

void pack_block(int64_t c_in, int64_t c_hidden, int64_t c_out, int64_t kernel, const BlockWeights& w, Lanes lanes,
                float* packed) {
  const bool has_expand = w.expand != nullptr;
  const BlockLayout layout = block_layout(c_in, c_hidden, c_out, kernel, has_expand, lanes);
  std::fill_n(packed, layout.size, 0.f);
  std::copy_n(w.project_bias, c_out, packed);
  const int64_t taps = kernel * kernel;
  for (int64_t i = 0; i < layout.chunks; ++i) {
    const int64_t first = i * kChunk, channels = std::min(kChunk, c_hidden - first);
    const ChunkLayout offsets = chunk_layout(channels, c_in, c_out, kernel, has_expand, lanes);
    float* chunk = packed + layout.first + i * layout.chunk;
    if (has_expand) {
      pack_matrix(
          c_in, channels, lanes, w.expand_bias + first,
          [&](int64_t k, int64_t n) { return w.expand[(first + n) * c_in + k]; }, chunk);
    }
    for (int64_t c = 0; c < channels; ++c) {
      float* vector = chunk + offsets.depthwise + c / lanes.lanes * lanes.lanes * (1 + taps) + c % lanes.lanes;
      *vector = w.depthwise_bias[first + c];
      for (int64_t tap = 0; tap < taps; ++tap) {
        vector[(1 + tap) * lanes.lanes] = w.depthwise[(first + c) * taps + tap];
      }
    }
    pack_matrix(
        channels, c_out, lanes, nullptr, [&](int64_t k, int64_t n) { return w.project[n * c_hidden + first + k]; },
        chunk + offsets.project);
  }
}

void pack_stem(int64_t c_in, int64_t c_out, int64_t kernel, const float* weight, const float* bias, Lanes lanes,
               float* packed) {
  const int64_t window = kernel * kernel;
  std::fill_n(packed, stem_size(c_in, c_out, kernel, lanes), 0.f);
  for (int64_t first = 0; first < c_out; first += kChunk) {
    pack_matrix(
        window * c_in, std::min(kChunk, c_out - first), lanes, bias + first,
        [&](int64_t k, int64_t n) { return weight[((first + n) * c_in + k % c_in) * window + k / c_in]; },
        packed + first * (1 + window * c_in));
  }
}

void pack_head(int64_t c_in, int64_t c_last, int64_t classes, const float* conv, const float* conv_bias,
               const float* classifier, const float* classifier_bias, Lanes lanes, float* packed) {
  std::fill_n(packed, head_size(c_in, c_last, classes, lanes), 0.f);
  pack_matrix(c_in, c_last, lanes, conv_bias, [&](int64_t k, int64_t n) { return conv[n * c_in + k]; }, packed);
  pack_matrix(
      c_last, classes, lanes, classifier_bias, [&](int64_t k, int64_t n) { return classifier[n * c_last + k]; },
      packed + matrix_size(c_in, c_last, lanes));
}

}  // namespace mnv2
