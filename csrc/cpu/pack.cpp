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
  const BlockLayout layout = block_layout(c_in, c_hidden, c_out, kernel, w.expand != nullptr, lanes);
  std::fill_n(packed, layout.size, 0.f);
  for (int64_t chunk = 0; chunk < layout.chunks; ++chunk) {
    const int64_t channel = chunk * kChunk, channels = std::min(kChunk, c_hidden - channel);
    if (!w.expand) break;
    pack_matrix(
        c_in, channels, lanes, w.expand_bias + channel,
        [&](int64_t k, int64_t n) { return w.expand[(channel + n) * c_in + k]; },
        packed + layout.expand + channel * (1 + c_in));
  }
  const int64_t taps = kernel * kernel;
  for (int64_t channel = 0; channel < c_hidden; ++channel) {
    float* vector = packed + layout.depthwise + channel / lanes.lanes * lanes.lanes * (1 + taps);
    vector[channel % lanes.lanes] = w.depthwise_bias[channel];
    for (int64_t tap = 0; tap < taps; ++tap) {
      vector[(1 + tap) * lanes.lanes + channel % lanes.lanes] = w.depthwise[channel * taps + tap];
    }
  }
  pack_matrix(
      c_hidden, c_out, lanes, nullptr, [&](int64_t k, int64_t n) { return w.project[n * c_hidden + k]; },
      packed + layout.project);
  std::copy_n(w.project_bias, c_out, packed + layout.project_bias);
}

void pack_stem(int64_t c_in, int64_t c_out, int64_t kernel, const float* weight, const float* bias, Lanes lanes,
               float* packed) {
  const int64_t window = kernel * kernel;
  std::fill_n(packed, stem_size(c_in, c_out, kernel, lanes), 0.f);
  pack_matrix(
      window * c_in, c_out, lanes, bias,
      [&](int64_t k, int64_t n) { return weight[(n * c_in + k % c_in) * window + k / c_in]; }, packed);
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
