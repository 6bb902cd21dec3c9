// Sums over pixels are formed part by part; here the parts are added up, in their order. Torch-free.
#pragma once

#include <algorithm>

#include "layout.h"
#include "plan.h"

namespace mnv2 {

// Merges the moments of consecutive parts of the pixels, (parts, row) each. Part i begins at pixel begin(i).
template <class Begin>
void merge_moments(int64_t parts, int64_t row, Range channels, const double* means, const double* squares,
                   const Begin& begin, double* mean, double* square) {
  for (int64_t c = channels.first; c < channels.last; ++c) mean[c] = means[c], square[c] = squares[c];
  for (int64_t i = 1; i < parts; ++i) {
    const double before = static_cast<double>(begin(i)), all = static_cast<double>(begin(i + 1));
    for (int64_t c = channels.first; c < channels.last; ++c) {
      const double delta = means[i * row + c] - mean[c];
      mean[c] += delta * (all - before) / all;
      square[c] += squares[i * row + c] + delta * delta * before * (all - before) / all;
    }
  }
}

inline int64_t hidden_row(const BlockShape& s) { return round_up(s.c_hidden, kChunk); }

// Adds up one chunk of sums of weights of `parts` parts, (chunks, rows, kChunk) each and `size` floats apart, into out
// (c_hidden, rows) or, transposed, (rows, c_hidden). at: where the chunk lies in `partial`.
inline void add_parts(const float* partial, int64_t parts, int64_t size, const BlockShape& s, int64_t at, int64_t chunk,
                      int64_t rows, bool transposed, float* out) {
  const int64_t channel = chunk * kChunk;
  const int64_t channels = std::min(kChunk, s.c_hidden - channel);
  for (int64_t row = 0; row < rows; ++row) {
    float sum[kChunk] = {};
    for (int64_t i = 0; i < parts; ++i) {
      const float* from = partial + i * size + (at * rows + row) * kChunk;
      for (int64_t c = 0; c < kChunk; ++c) sum[c] += from[c];
    }
    for (int64_t c = 0; c < channels; ++c) {
      out[transposed ? row * s.c_hidden + channel + c : (channel + c) * rows + row] = sum[c];
    }
  }
}

// Adds up sums over channels, (parts, row).
inline void add_sums(const double* partial, int64_t parts, int64_t row, Range channels, double* out) {
  for (int64_t c = channels.first; c < channels.last; ++c) {
    out[c] = 0.;
    for (int64_t i = 0; i < parts; ++i) out[c] += partial[i * row + c];
  }
}

}  // namespace mnv2
