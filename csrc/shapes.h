// The shapes of a block, a dense convolution and a head, and the rules that they obey. This is the only file that knows
// the order of their fields in the operators' lists of integers. Torch-free. Functions have internal linkage:
// ISA-specific files include this header, and the linker must not use their copy of a function in the portable files.
#pragma once

#include <cstdint>

namespace mnv2 {

// Storage type of activations. On the CPU arithmetic is fp32 for all of them.
enum class DType : int32_t { kFloat32, kBFloat16, kFloat16 };
static constexpr DType kDTypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};

static inline const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::kBFloat16: return "bfloat16";
    case DType::kFloat16: return "float16";
    default: return "float32";
  }
}
static inline int64_t dtype_bytes(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// Size of a unit's input.
struct ImageSize {
  int64_t n, h, w, c;

  bool operator==(const ImageSize&) const = default;
};

// Pixels.
struct Padding {
  int64_t top, left, bottom, right;

  bool operator==(const Padding&) const = default;
};

// A clamp to [lo, hi]: ReLU6 is 0..6, ReLU is 0..inf.
struct Activation {
  float lo, hi;

  bool operator==(const Activation&) const = default;
};
static constexpr float kInfinity = __builtin_huge_valf();
static constexpr Activation kNoActivation{-kInfinity, kInfinity};

// x (n, h, w, c_in) -> 1x1 expand (c_hidden) -> clamp -> depthwise kernel x kernel -> clamp -> 1x1 project (c_out) ->
// clamp to `out`; with `residual`, + x.
struct BlockShape {
  int64_t n, h, w;
  int64_t c_in, c_hidden, c_out;
  int64_t kernel, stride, dilation;  // of the depthwise convolution
  Padding pad;
  bool has_expand;  // false: c_hidden == c_in and the depthwise reads x
  bool residual;    // adds x
  Activation act;
  Activation out = kNoActivation;  // of the projection, before x is added

  bool operator==(const BlockShape&) const = default;
};

// Dense kernel x kernel convolution + clamp: the stem, or a pointwise convolution.
struct DenseShape {
  int64_t n, h, w;
  int64_t c_in, c_out;
  int64_t kernel, stride;
  Padding pad;
  Activation act;

  bool operator==(const DenseShape&) const = default;
};

// 1x1 convolution (c_last) + clamp, mean over the pixels, linear classifier.
struct HeadShape {
  int64_t n, h, w;
  int64_t c_in, c_last, classes;
  Activation act;

  bool operator==(const HeadShape&) const = default;
};

static inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Pixels that a dilated kernel spans.
static inline int64_t kernel_extent(int64_t kernel, int64_t dilation) { return (kernel - 1) * dilation + 1; }

// Output size of a convolution along one axis; 0 if the kernel does not fit.
static inline int64_t conv_out(int64_t size, int64_t pads, int64_t kernel, int64_t stride, int64_t dilation) {
  const int64_t room = size + pads - kernel_extent(kernel, dilation);
  return room < 0 ? 0 : room / stride + 1;
}

static inline int64_t h_out(const BlockShape& s) {
  return conv_out(s.h, s.pad.top + s.pad.bottom, s.kernel, s.stride, s.dilation);
}
static inline int64_t w_out(const BlockShape& s) {
  return conv_out(s.w, s.pad.left + s.pad.right, s.kernel, s.stride, s.dilation);
}
static inline int64_t h_out(const DenseShape& s) {
  return conv_out(s.h, s.pad.top + s.pad.bottom, s.kernel, s.stride, 1);
}
static inline int64_t w_out(const DenseShape& s) {
  return conv_out(s.w, s.pad.left + s.pad.right, s.kernel, s.stride, 1);
}

// Multiply-adds of the block for one image.
static inline int64_t macs(const BlockShape& s) {
  const int64_t expand = s.has_expand ? s.h * s.w * s.c_in * s.c_hidden : 0;
  return expand + h_out(s) * w_out(s) * s.c_hidden * (s.kernel * s.kernel + s.c_out);
}

// ------------------------------------------------------------------------------------------------------------- rules

// The largest side, channel count, stride, dilation and padding. With these limits no size in bytes overflows.
static constexpr int64_t kMostSide = int64_t{1} << 20;
static constexpr int64_t kMostKernel = 63;

// The rule that the shape breaks, or nullptr.
static inline const char* broken_rule(const BlockShape& s) {
  if (s.n < 0 || s.h < 0 || s.w < 0) return "sizes must not be negative";
  if (s.h > kMostSide || s.w > kMostSide) return "height and width must be at most 2^20";
  if (s.c_in < 1 || s.c_hidden < 1 || s.c_out < 1) return "channel counts must be positive";
  if (s.c_in > kMostSide || s.c_hidden > kMostSide || s.c_out > kMostSide) return "channel counts must be at most 2^20";
  if (s.kernel < 1 || s.kernel > kMostKernel || s.kernel % 2 == 0) return "kernel must be odd, from 1 to 63";
  if (s.stride < 1 || s.dilation < 1) return "stride and dilation must be positive";
  if (s.stride > kMostSide || s.dilation > kMostSide) return "stride and dilation must be at most 2^20";
  if (s.pad.top < 0 || s.pad.left < 0 || s.pad.bottom < 0 || s.pad.right < 0) return "padding must not be negative";
  if (s.pad.top > kMostSide || s.pad.left > kMostSide || s.pad.bottom > kMostSide || s.pad.right > kMostSide)
    return "padding must be at most 2^20";
  if (!s.has_expand && s.c_in != s.c_hidden) return "without an expansion c_hidden must equal the channels of x";
  if (h_out(s) < 1 || w_out(s) < 1) return "the depthwise kernel must fit into the padded input";
  if (s.residual && (s.stride != 1 || s.c_in != s.c_out || h_out(s) != s.h || w_out(s) != s.w))
    return "a residual needs stride 1 and an output of the input's shape";
  if (!(s.act.lo <= s.act.hi) || !(s.out.lo <= s.out.hi)) return "activation bounds must satisfy lo <= hi";
  return nullptr;
}

static inline const char* broken_rule(const DenseShape& s) {
  return broken_rule(BlockShape{.n = s.n,
                                .h = s.h,
                                .w = s.w,
                                .c_in = s.c_in,
                                .c_hidden = s.c_in,
                                .c_out = s.c_out,
                                .kernel = s.kernel,
                                .stride = s.stride,
                                .dilation = 1,
                                .pad = s.pad,
                                .has_expand = false,
                                .residual = false,
                                .act = s.act});
}

static inline const char* broken_rule(const HeadShape& s) {
  return broken_rule(BlockShape{.n = s.n,
                                .h = s.h,
                                .w = s.w,
                                .c_in = s.c_in,
                                .c_hidden = s.c_last,
                                .c_out = s.classes,
                                .kernel = 1,
                                .stride = 1,
                                .dilation = 1,
                                .pad = {},
                                .has_expand = true,
                                .residual = false,
                                .act = s.act});
}

// --------------------------------------------------------------------------------------------- operators' integers

// TensorFlow's "SAME": out = ceil(in / stride), the odd pixel at the bottom and right.
static inline Padding same_padding(int64_t h, int64_t w, int64_t kernel, int64_t stride, int64_t dilation) {
  // broken_rule() reports bad values later; here they must not overflow.
  if (stride < 1 || kernel > kMostKernel || dilation > kMostSide) return {};
  const auto total = [=](int64_t size) {
    const int64_t pads = (divide_up(size, stride) - 1) * stride + kernel_extent(kernel, dilation) - size;
    return pads < 0 ? 0 : pads;
  };
  const int64_t vertical = total(h), horizontal = total(w);
  return {vertical / 2, horizontal / 2, vertical - vertical / 2, horizontal - horizontal / 2};
}

// Names and order of the integers that describe a unit to an operator. If `same` is not 0, the padding follows from the
// input's size, and top, left, bottom and right are ignored.
static constexpr const char* kBlockFields[] = {"c_hidden", "c_out", "kernel", "stride", "dilation",   "same",
                                               "top",      "left",  "bottom", "right",  "has_expand", "residual"};
static constexpr const char* kDenseFields[] = {"c_out", "kernel", "stride", "same", "top", "left", "bottom", "right"};
static constexpr const char* kHeadFields[] = {"c_last", "classes"};

template <int64_t size>
static constexpr int64_t count_of(const char* const (&)[size]) {
  return size;
}

// `v` holds one value for each of the unit's fields, in their order.
static inline BlockShape block_from(const ImageSize& x, const int64_t* v, Activation act,
                                    Activation out = kNoActivation) {
  BlockShape s{.n = x.n,
               .h = x.h,
               .w = x.w,
               .c_in = x.c,
               .c_hidden = v[0],
               .c_out = v[1],
               .kernel = v[2],
               .stride = v[3],
               .dilation = v[4],
               .pad = {.top = v[6], .left = v[7], .bottom = v[8], .right = v[9]},
               .has_expand = v[10] != 0,
               .residual = v[11] != 0,
               .act = act,
               .out = out};
  if (v[5] != 0) s.pad = same_padding(s.h, s.w, s.kernel, s.stride, s.dilation);
  return s;
}

static inline DenseShape dense_from(const ImageSize& x, const int64_t* v, Activation act) {
  DenseShape s{.n = x.n,
               .h = x.h,
               .w = x.w,
               .c_in = x.c,
               .c_out = v[0],
               .kernel = v[1],
               .stride = v[2],
               .pad = {.top = v[4], .left = v[5], .bottom = v[6], .right = v[7]},
               .act = act};
  if (v[3] != 0) s.pad = same_padding(s.h, s.w, s.kernel, s.stride, 1);
  return s;
}

static inline HeadShape head_from(const ImageSize& x, const int64_t* v, Activation act) {
  return {.n = x.n, .h = x.h, .w = x.w, .c_in = x.c, .c_last = v[0], .classes = v[1], .act = act};
}

// The smallest block, dense convolution and head that have weights of these sizes.
static inline BlockShape block_of_weights(int64_t c_in, int64_t c_hidden, int64_t c_out, int64_t kernel,
                                          bool has_expand) {
  return {.n = 0,
          .h = kernel,
          .w = kernel,
          .c_in = c_in,
          .c_hidden = c_hidden,
          .c_out = c_out,
          .kernel = kernel,
          .stride = 1,
          .dilation = 1,
          .pad = {},
          .has_expand = has_expand,
          .residual = false,
          .act = {}};
}

// A linear map of x with a clamp, as a block that ends at its expansion.
static inline BlockShape linear_block(const ImageSize& x, int64_t rows, const Activation& act) {
  BlockShape s = block_of_weights(x.c, rows, 1, 1, true);
  s.n = x.n, s.h = x.h, s.w = x.w;
  s.act = act;
  return s;
}
static inline DenseShape dense_of_weights(int64_t c_in, int64_t c_out, int64_t kernel) {
  return {.n = 0,
          .h = kernel,
          .w = kernel,
          .c_in = c_in,
          .c_out = c_out,
          .kernel = kernel,
          .stride = 1,
          .pad = {},
          .act = {}};
}
static inline HeadShape head_of_weights(int64_t c_in, int64_t c_last, int64_t classes) {
  return {.n = 0, .h = 1, .w = 1, .c_in = c_in, .c_last = c_last, .classes = classes, .act = {}};
}

}  // namespace mnv2
