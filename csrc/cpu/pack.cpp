#include "pack.h"

#include <algorithm>
#include <vector>

namespace mnv2 {
namespace {

// Panels of the K x N matrix element(k, n). The bias, if there is one, is row 0 of every panel. Returns the end.
template <class Element>
float* pack_matrix(int64_t rows, int64_t columns, Lanes lanes, const float* bias, Element element, float* packed) {
  const Panels panels = panels_of(columns, lanes);
  for (int64_t i = 0; i < panels.count; ++i) {
    const int64_t begin = panel_begin(panels, i) * lanes.lanes, end = panel_begin(panels, i + 1) * lanes.lanes;
    const int64_t last = std::min(end, columns);
    if (bias) packed = std::fill_n(std::copy(bias + begin, bias + last, packed), end - last, 0.f);
    for (int64_t k = 0; k < rows; ++k) {
      for (int64_t n = begin; n < last; ++n) packed[n - begin] = element(k, n);
      std::fill(packed + (last - begin), packed + (end - begin), 0.f);
      packed += end - begin;
    }
  }
  return packed;
}

// A norm's scale and shift of `count` channels from `first` on, in the weights' precision.
struct Scaled {
  float scale[kChunk], shift[kChunk];

  Scaled(const BlockWeights::Norm& norm, int64_t first, int64_t count) : scale{}, shift{} {
    for (int64_t i = 0; i < count; ++i) {
      scale[i] = norm.scale ? static_cast<float>(norm.scale[first + i]) : 1.f;
      shift[i] = norm.shift ? static_cast<float>(norm.shift[first + i]) : 0.f;
    }
  }
};

std::vector<float> scales_of(const BlockWeights::Norm& norm, int64_t count) {
  std::vector<float> scale(static_cast<size_t>(count), 1.f);
  if (norm.scale) std::copy_n(norm.scale, count, scale.begin());
  return scale;
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
  if (w.project_norm.shift) std::copy_n(w.project_norm.shift, c_out, packed);
  const std::vector<float> project_scale = scales_of(w.project_norm, c_out);
  const int64_t taps = kernel * kernel;
  for_each_chunk(c_hidden, parallel, [&](int64_t i, int64_t first, int64_t channels) {
    const ChunkLayout offsets = chunk_layout(channels, c_in, c_out, kernel, has_expand, lanes);
    float* chunk = packed + layout.first + i * layout.chunk;
    if (has_expand) {
      const Scaled norm(w.expand_norm, first, channels);
      pack_matrix(
          c_in, channels, lanes, norm.shift,
          [&](int64_t k, int64_t n) { return w.expand[(first + n) * c_in + k] * norm.scale[n]; }, chunk);
    }
    const Scaled norm(w.depthwise_norm, first, channels);
    std::fill(chunk + offsets.depthwise, chunk + offsets.project, 0.f);
    for (int64_t c = 0; c < channels; ++c) {
      float* vector = chunk + offsets.depthwise + c / lanes.lanes * lanes.lanes * (1 + taps) + c % lanes.lanes;
      *vector = norm.shift[c];
      for (int64_t tap = 0; tap < taps; ++tap) {
        vector[(1 + tap) * lanes.lanes] = w.depthwise[(first + c) * taps + tap] * norm.scale[c];
      }
    }
    float* const end = pack_matrix(
        channels, c_out, lanes, nullptr,
        [&](int64_t k, int64_t n) {
          return w.project[n * c_hidden + first + k] * project_scale[static_cast<size_t>(n)];
        },
        chunk + offsets.project);
    std::fill(end, chunk + offsets.size, 0.f);
  });
}

void pack_backward(int64_t c_in, int64_t c_hidden, int64_t c_out, int64_t kernel, const BlockWeights& w, Lanes lanes,
                   const ParallelFor& parallel, float* packed) {
  const BlockLayout layout = block_layout(c_out, c_hidden, c_in, kernel, true, lanes);
  std::fill_n(packed, layout.first, 0.f);
  const std::vector<float> project_scale = scales_of(w.project_norm, c_out);
  for_each_chunk(c_hidden, parallel, [&](int64_t i, int64_t first, int64_t channels) {
    const ChunkLayout offsets = chunk_layout(channels, c_out, c_in, kernel, true, lanes);
    float* chunk = packed + layout.first + i * layout.chunk;
    const float bias[kChunk] = {};
    pack_matrix(
        c_out, channels, lanes, bias,
        [&](int64_t k, int64_t n) {
          return w.project[k * c_hidden + first + n] * project_scale[static_cast<size_t>(k)];
        },
        chunk);
    std::fill(chunk + offsets.depthwise, chunk + offsets.size, 0.f);
    if (!w.expand) return;
    const Scaled norm(w.expand_norm, first, channels);
    pack_matrix(
        channels, c_in, lanes, nullptr,
        [&](int64_t k, int64_t n) { return w.expand[(first + k) * c_in + n] * norm.scale[k]; },
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
