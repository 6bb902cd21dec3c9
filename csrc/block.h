// The one description of an inverted-residual block that every layer passes down, and its shape rules.
// Torch-free. Functions have internal linkage: ISA-specific files include this header, and an inline function
// compiled there must never replace the one of the portable files.
#pragma once

#include <cstdint>

namespace mnv2 {

// Storage type of activations. Arithmetic and packed weights are fp32 for all of them.
enum class DType : int32_t { kFloat32, kBFloat16, kFloat16 };

static inline int64_t dtype_bytes(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// x (n, h, w, c_in) -> 1x1 expand (c_hidden) -> clamp -> depthwise kernel x kernel -> clamp -> 1x1 project (c_out) -> +
// x
struct BlockShape {
  int64_t n, h, w;
  int64_t c_in, c_hidden, c_out;
  int64_t kernel, stride, dilation;
  int64_t pad_top, pad_left, pad_bottom, pad_right;  // of the depthwise convolution, in pixels
  bool has_expand;                                   // false: c_hidden == c_in and the depthwise reads x
  bool residual;                                     // adds x to the projection
  float lo, hi;                                      // activation bounds: ReLU6 is 0..6, ReLU is 0..inf
};

// Dense kernel x kernel convolution + clamp at the network's entrance.
struct StemShape {
  int64_t n, h, w;
  int64_t c_in, c_out;
  int64_t kernel, stride;
  int64_t pad_top, pad_left, pad_bottom, pad_right;
  float lo, hi;
};

// 1x1 convolution (c_last) + clamp, mean over the pixels, linear classifier.
struct HeadShape {
  int64_t n, h, w;
  int64_t c_in, c_last, classes;
  float lo, hi;
};

static inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Pixels that a dilated kernel spans.
static inline int64_t kernel_extent(int64_t kernel, int64_t dilation) { return (kernel - 1) * dilation + 1; }

// Output size of a convolution along one axis; 0 where the kernel does not fit.
static inline int64_t conv_out(int64_t size, int64_t pads, int64_t kernel, int64_t stride, int64_t dilation) {
  const int64_t room = size + pads - kernel_extent(kernel, dilation);
  return room < 0 ? 0 : room / stride + 1;
}

static inline int64_t h_out(const BlockShape& s) {
  return conv_out(s.h, s.pad_top + s.pad_bottom, s.kernel, s.stride, s.dilation);
}
static inline int64_t w_out(const BlockShape& s) {
  return conv_out(s.w, s.pad_left + s.pad_right, s.kernel, s.stride, s.dilation);
}
static inline int64_t h_out(const StemShape& s) {
  return conv_out(s.h, s.pad_top + s.pad_bottom, s.kernel, s.stride, 1);
}
static inline int64_t w_out(const StemShape& s) {
  return conv_out(s.w, s.pad_left + s.pad_right, s.kernel, s.stride, 1);
}

// Multiply-adds of one image.
static inline int64_t macs(const BlockShape& s) {
  const int64_t expand = s.has_expand ? s.h * s.w * s.c_in * s.c_hidden : 0;
  return expand + h_out(s) * w_out(s) * s.c_hidden * (s.kernel * s.kernel + s.c_out);
}

// The rule that the shape breaks, or nullptr. The longest side is bounded so that no size in bytes overflows.
static inline const char* broken_rule(const BlockShape& s) {
  constexpr int64_t kSide = int64_t{1} << 20;
  if (s.n < 0 || s.h < 0 || s.w < 0) return "sizes must not be negative";
  if (s.h > kSide || s.w > kSide) return "height and width must be at most 2^20";
  if (s.c_in < 1 || s.c_hidden < 1 || s.c_out < 1) return "channel counts must be positive";
  if (s.c_in > kSide || s.c_hidden > kSide || s.c_out > kSide) return "channel counts must be at most 2^20";
  if (s.kernel < 1 || s.kernel > 63 || s.kernel % 2 == 0) return "kernel must be odd, from 1 to 63";
  if (s.stride < 1 || s.dilation < 1) return "stride and dilation must be positive";
  if (s.stride > kSide || s.dilation > kSide) return "stride and dilation must be at most 2^20";
  if (s.pad_top < 0 || s.pad_left < 0 || s.pad_bottom < 0 || s.pad_right < 0) return "padding must not be negative";
  if (s.pad_top > kSide || s.pad_left > kSide || s.pad_bottom > kSide || s.pad_right > kSide)
    return "padding must be at most 2^20";
  if (!s.has_expand && s.c_in != s.c_hidden) return "without an expansion c_hidden must equal the channels of x";
  if (h_out(s) < 1 || w_out(s) < 1) return "the depthwise kernel must fit into the padded input";
  if (s.residual && (s.stride != 1 || s.c_in != s.c_out || h_out(s) != s.h || w_out(s) != s.w))
    return "a residual needs stride 1 and an output of the input's shape";
  if (!(s.lo <= s.hi)) return "activation bounds must satisfy lo <= hi";
  return nullptr;
}

static inline const char* broken_rule(const StemShape& s) {
  const BlockShape as_block{s.n,       s.h,        s.w,          s.c_in,      s.c_in, s.c_out, s.kernel, s.stride, 1,
                            s.pad_top, s.pad_left, s.pad_bottom, s.pad_right, false,  false,   s.lo,     s.hi};
  return broken_rule(as_block);
}

static inline const char* broken_rule(const HeadShape& s) {
  const BlockShape as_block{s.n, s.h, s.w, s.c_in, s.c_last, s.classes, 1, 1, 1, 0, 0, 0, 0, true, false, s.lo, s.hi};
  return broken_rule(as_block);
}

}  // namespace mnv2
