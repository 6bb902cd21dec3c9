// Windows of a dense convolution on the host, for backends whose maps are there. Torch-free.
#pragma once

#include "../shapes.h"

namespace mnv2::train {

// The adjoint of an image's windows (h_out, w_out, kernel, kernel, c_in): adds them up in `out` (h, w, c_in).
template <class T>
void add_windows_of(const DenseShape& s, int64_t image, const T* windows, T* out) {
  const int64_t height = h_out(s), width = w_out(s), map = s.h * s.w * s.c_in;
  out += image * map;
  windows += image * height * width * s.kernel * s.kernel * s.c_in;
  for (int64_t i = 0; i < map; ++i) out[i] = T{};
  for (int64_t row = 0; row < height; ++row) {
    for (int64_t column = 0; column < width; ++column) {
      for (int64_t ky = 0; ky < s.kernel; ++ky) {
        for (int64_t kx = 0; kx < s.kernel; ++kx, windows += s.c_in) {
          const int64_t y = row * s.stride - s.pad.top + ky, x = column * s.stride - s.pad.left + kx;
          if (y < 0 || y >= s.h || x < 0 || x >= s.w) continue;
          for (int64_t c = 0; c < s.c_in; ++c) out[(y * s.w + x) * s.c_in + c] += windows[c];
        }
      }
    }
  }
}

// Weights (c_out, c_in, taps) to (c_out, taps, c_in), or `back`.
template <class T>
void permute_windows(const DenseShape& s, const T* from, bool back, T* to) {
  const int64_t taps = s.kernel * s.kernel;
  for (int64_t i = 0; i < s.c_out; ++i) {
    for (int64_t c = 0; c < s.c_in; ++c) {
      for (int64_t tap = 0; tap < taps; ++tap) {
        const int64_t weight = (i * s.c_in + c) * taps + tap, matrix = (i * taps + tap) * s.c_in + c;
        back ? to[weight] = from[matrix] : to[matrix] = from[weight];
      }
    }
  }
}

}  // namespace mnv2::train
