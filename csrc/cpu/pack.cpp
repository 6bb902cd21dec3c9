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

float folded(float weight, const BlockWeights::Norm& norm, int64_t channel) {
  return norm.scale ? static_cast<float>(weight * norm.scale[channel]) : weight;
}
float shift_of(const BlockWeights::Norm& norm, int64_t channel) {
  return norm.shift ? static_cast<float>(norm.shift[channel]) : 0.f;
}

// Calls f(chunk, its first channel, its channels) for every chunk.
template <class F>
void for_each_chunk(int64_t c_hidden, const ParallelFor& parallel, const F& f) {
  parallel(divide_up(c_hidden, kChunk), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i, i * kChunk, std::min(kChunk, c_hidden - i * kChunk));
  });
}

}  // namespace

void pack_block(int64_t c_in, int64_t c_hidden, int64_t c_out, int64_t kernel, const BlockWeights& w, Lanes lanes,
                const ParallelFor& parallel, float* packed) {
  const bool has_expand = w.expand != nullptr;
  const BlockLayout layout = block_layout(c_in, c_hidden, c_out, kernel, has_expand, lanes);
  std::fill_n(packed, layout.first, 0.f);
  for (int64_t c = 0; c < c_out; ++c) packed[c] = shift_of(w.project_norm, c);
  const int64_t taps = kernel * kernel;
  for_each_chunk(c_hidden, parallel, [&](int64_t i, int64_t first, int64_t channels) {
    const ChunkLayout offsets = chunk_layout(channels, c_in, c_out, kernel, has_expand, lanes);
    float* chunk = packed + layout.first + i * layout.chunk;
    std::fill_n(chunk, offsets.size, 0.f);
    if (has_expand) {
      float bias[kChunk];
      for (int64_t c = 0; c < channels; ++c) bias[c] = shift_of(w.expand_norm, first + c);
      pack_matrix(
          c_in, channels, lanes, bias,
          [&](int64_t k, int64_t n) { return folded(w.expand[(first + n) * c_in + k], w.expand_norm, first + n); },
          chunk);
    }
    for (int64_t c = 0; c < channels; ++c) {
      float* vector = chunk + offsets.depthwise + c / lanes.lanes * lanes.lanes * (1 + taps) + c % lanes.lanes;
      *vector = shift_of(w.depthwise_norm, first + c);
      for (int64_t tap = 0; tap < taps; ++tap) {
        vector[(1 + tap) * lanes.lanes] = folded(w.depthwise[(first + c) * taps + tap], w.depthwise_norm, first + c);
      }
    }
    pack_matrix(
        channels, c_out, lanes, nullptr,
        [&](int64_t k, int64_t n) { return folded(w.project[n * c_hidden + first + k], w.project_norm, n); },
        chunk + offsets.project);
  });
}

void pack_backward(int64_t c_in, int64_t c_hidden, int64_t c_out, int64_t kernel, const BlockWeights& w, Lanes lanes,
                   const ParallelFor& parallel, float* packed) {
  const BlockLayout layout = block_layout(c_out, c_hidden, c_in, kernel, true, lanes);
  std::fill_n(packed, layout.first, 0.f);
  for_each_chunk(c_hidden, parallel, [&](int64_t i, int64_t first, int64_t channels) {
    const ChunkLayout offsets = chunk_layout(channels, c_out, c_in, kernel, true, lanes);
    float* chunk = packed + layout.first + i * layout.chunk;
    std::fill_n(chunk, offsets.size, 0.f);
    const float bias[kChunk] = {};
    pack_matrix(
        c_out, channels, lanes, bias,
        [&](int64_t k, int64_t n) { return folded(w.project[k * c_hidden + first + n], w.project_norm, k); }, chunk);
    if (!w.expand) return;
    pack_matrix(
        channels, c_in, lanes, nullptr,
        [&](int64_t k, int64_t n) { return folded(w.expand[(first + k) * c_in + n], w.expand_norm, first + k); },
        chunk + offsets.project);
  });
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
