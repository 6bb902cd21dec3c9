// The depthwise filter of the block's kernel, from expanded pixels in shared memory to operands of the projection.
#pragma once

#include "tile.cuh"

namespace mnv2 {
namespace cuda {

// Depthwise filters: any kernel, stride and dilation, or 3x3 without dilation.
enum : int { kAnyFilter = 0, kStride1 = 1, kStride2 = 2 };

// Where the eight hidden channels 8 t to 8 t + 7 of a pixel lie: pieces of 16 bytes, `kVector` apart, so that a warp's
// accesses have no bank conflicts.
template <class M>
struct Expanded {
  static constexpr int kPixel = 32 * M::kBytes;
  static constexpr int kVectors = M::kBytes / 2;
  static constexpr int kVector = 64;
};

// An output pixel's eight filtered channels as two operands of the projection.
template <class M>
struct Filtered {
  Operand<M> half[2];
};

// The filter's sums: fp16 in pairs, everything else in fp32.
template <class M>
struct FilterSums {
  float v[8];

  MNV2_DEVICE void set(const unsigned char* bias) {
    MNV2_UNROLL
    for (int i = 0; i < 8; ++i) v[i] = reinterpret_cast<const float*>(bias)[i];
  }
};
template <>
struct FilterSums<HalfMath> {
  uint32_t v[4];

  MNV2_DEVICE void set(const unsigned char* bias) {
    const Four b = *reinterpret_cast<const Four*>(bias);
    v[0] = b.x, v[1] = b.y, v[2] = b.z, v[3] = b.w;
  }
};

// A filter's tap or a pixel, for eight channels, in the form in which it is multiplied.
template <class M>
using Eight = FilterSums<M>;

MNV2_DEVICE void load_tap(const unsigned char* from, FilterSums<HalfMath>& to) { to.set(from); }
template <class M>
MNV2_DEVICE void load_tap(const unsigned char* from, FilterSums<M>& to) {
  to.set(from);
}

MNV2_DEVICE void load_pixel(const unsigned char* from, Eight<HalfMath>& to) { to.set(from); }
MNV2_DEVICE void load_pixel(const unsigned char* from, Eight<BFloat16Math>& to) {
  const Four p = *reinterpret_cast<const Four*>(from);
  const uint32_t words[4] = {p.x, p.y, p.z, p.w};
  MNV2_UNROLL
  for (int i = 0; i < 4; ++i)
    to.v[2 * i] = unpack_first<BFloat16>(words[i]), to.v[2 * i + 1] = unpack_second<BFloat16>(words[i]);
}
template <bool kExact>
MNV2_DEVICE void load_pixel(const unsigned char* from, Eight<FloatMath<kExact>>& to) {
  MNV2_UNROLL
  for (int i = 0; i < 2; ++i) {
    const Four p = *reinterpret_cast<const Four*>(from + i * Expanded<FloatMath<kExact>>::kVector);
    to.v[4 * i] = bits_to_float(p.x), to.v[4 * i + 1] = bits_to_float(p.y);
    to.v[4 * i + 2] = bits_to_float(p.z), to.v[4 * i + 3] = bits_to_float(p.w);
  }
}

MNV2_DEVICE void add_product(FilterSums<HalfMath>& sums, const Eight<HalfMath>& pixel, const Eight<HalfMath>& tap) {
  MNV2_UNROLL
  for (int i = 0; i < 4; ++i) sums.v[i] = fma_half2(pixel.v[i], tap.v[i], sums.v[i]);
}
template <class M>
MNV2_DEVICE void add_product(FilterSums<M>& sums, const Eight<M>& pixel, const Eight<M>& tap) {
  MNV2_UNROLL
  for (int i = 0; i < 8; ++i) sums.v[i] = fma(pixel.v[i], tap.v[i], sums.v[i]);
}

// The same for the last product of a sum. kRelu: clamped from below to 0, if that takes no instruction of its own.
template <bool kRelu, class M>
MNV2_DEVICE void add_last(FilterSums<M>& sums, const Eight<M>& pixel, const Eight<M>& tap) {
  if constexpr (kRelu && M::kFilterBytes == 2) {
    MNV2_UNROLL
    for (int i = 0; i < 4; ++i) sums.v[i] = fma_relu_half2(pixel.v[i], tap.v[i], sums.v[i]);
  } else {
    add_product(sums, pixel, tap);
  }
}

// kRelu: `lo` is 0, and sums are those of add_last().
template <bool kRelu>
MNV2_DEVICE void clamp_filtered(const FilterSums<HalfMath>& sums, float lo, float hi, Filtered<HalfMath>& to) {
  const uint32_t least = pack<Half>(lo, lo), most = pack<Half>(hi, hi);
  MNV2_UNROLL
  for (int i = 0; i < 4; ++i)
    to.half[i / 2].r[i % 2] = min_pair<Half>(kRelu ? sums.v[i] : max_pair<Half>(sums.v[i], least), most);
}
template <bool kRelu>
MNV2_DEVICE void clamp_filtered(const FilterSums<BFloat16Math>& sums, float lo, float hi, Filtered<BFloat16Math>& to) {
  const uint32_t least = pack<BFloat16>(lo, lo), most = pack<BFloat16>(hi, hi);
  MNV2_UNROLL
  for (int i = 0; i < 4; ++i)
    to.half[i / 2].r[i % 2] = clamped_pair<BFloat16, kRelu>(sums.v[2 * i], sums.v[2 * i + 1], least, most);
}
template <bool, bool kExact>
MNV2_DEVICE void clamp_filtered(const FilterSums<FloatMath<kExact>>& sums, float lo, float hi,
                                Filtered<FloatMath<kExact>>& to) {
  MNV2_UNROLL
  for (int i = 0; i < 8; ++i) to.half[i / 4].r[i % 4] = float_to_bits(clamp(sums.v[i], lo, hi));
}

// The depthwise filter over a lane's patch. window: the lane's channels of the patch's first input pixel. filters: the
// lane's channels of the first tap. bias: the lane's channels.
template <class M, int kHeight, int kWidth, int kFilter>
MNV2_DEVICE void filter_patch(const BlockArgs& a, const unsigned char* window, const unsigned char* filters,
                              const unsigned char* bias, Filtered<M> (&out)[kHeight * kWidth]) {
  constexpr int kPixel = Expanded<M>::kPixel, kTap = 32 * M::kFilterBytes;
  FilterSums<M> sums[kHeight * kWidth];
  sums[0].set(bias);
  MNV2_UNROLL
  for (int i = 1; i < kHeight * kWidth; ++i) sums[i] = sums[0];
  if constexpr (kFilter == kAnyFilter) {
    MNV2_NO_UNROLL
    for (int ky = 0; ky < a.kernel; ++ky, window += a.dilation * a.e_pitch) {
      const unsigned char* from = window;
      MNV2_NO_UNROLL
      for (int kx = 0; kx < a.kernel; ++kx, from += a.dilation * kPixel, filters += kTap) {
        if constexpr (M::kBytes == 4) warp_barrier();  // else the compiler spills
        Eight<M> weight;
        load_tap(filters, weight);
        MNV2_UNROLL
        for (int y = 0; y < kHeight; ++y) {
          MNV2_UNROLL
          for (int x = 0; x < kWidth; ++x) {
            Eight<M> pixel;
            load_pixel(from + y * a.stride * a.e_pitch + x * a.stride * kPixel, pixel);
            add_product(sums[y * kWidth + x], pixel, weight);
          }
        }
      }
    }
    MNV2_UNROLL
    for (int i = 0; i < kHeight * kWidth; ++i) clamp_filtered<false>(sums[i], a.lo, a.hi, out[i]);
  } else {
    // A row of taps after the other, to save registers: the barriers keep the compiler from reading too far ahead. At
    // stride 1 the lower of two input rows is the upper one for the next taps.
    constexpr int kStride = kFilter, kColumns = (kWidth - 1) * kStride + 3;
    constexpr bool kKept = kHeight == 2 && kStride == 1;
    Eight<M> kept[kColumns]{}, taps[3], last[kHeight * kWidth];
    if constexpr (kKept) {
      MNV2_UNROLL
      for (int column = 0; column < kColumns; ++column) load_pixel(window + column * kPixel, kept[column]);
    }
    MNV2_UNROLL
    for (int ky = 0; ky < 3; ++ky) {
      if (ky > 0) warp_barrier();
      MNV2_UNROLL
      for (int i = 0; i < 3; ++i) load_tap(filters + (ky * 3 + i) * kTap, taps[i]);
      MNV2_UNROLL
      for (int y = 0; y < kHeight; ++y) {
        MNV2_UNROLL
        for (int column = 0; column < kColumns; ++column) {
          Eight<M> pixel = kept[column];
          if (!kKept || y == 1) load_pixel(window + (y * kStride + ky) * a.e_pitch + column * kPixel, pixel);
          MNV2_UNROLL
          for (int x = 0; x < kWidth; ++x) {
            const int kx = column - x * kStride;
            if (ky == 2 && kx == 2)
              last[y * kWidth + x] = pixel;
            else if (kx >= 0 && kx < 3)
              add_product(sums[y * kWidth + x], pixel, taps[kx]);
          }
          if (kKept && y == 1) kept[column] = pixel;
        }
      }
    }
    if (M::kBytes == 2 && a.lo == 0.f) {
      MNV2_UNROLL
      for (int i = 0; i < kHeight * kWidth; ++i)
        add_last<true>(sums[i], last[i], taps[2]), clamp_filtered<true>(sums[i], a.lo, a.hi, out[i]);
    } else {
      MNV2_UNROLL
      for (int i = 0; i < kHeight * kWidth; ++i)
        add_last<false>(sums[i], last[i], taps[2]), clamp_filtered<false>(sums[i], a.lo, a.hi, out[i]);
    }
  }
}

}  // namespace cuda
}  // namespace mnv2
