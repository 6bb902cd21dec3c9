// Checks at the operators' boundary. Every message names operator, argument, rule and what was got.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "block.h"

namespace mnv2 {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Throws with the operator's name and the parts one after the other.
template <class... Parts>
[[noreturn]] void fail(const char* op, const Parts&... parts) {
  std::ostringstream message;
  message << "mnv2_fused::" << op << ": ";
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

// A macro, so that the message is put together only where it is needed.
#define MNV2_CHECK(condition, op, ...) \
  if (!(condition)) ::mnv2::fail(op, __VA_ARGS__)

inline std::string describe(const Tensor& t) {
  std::string text = "(";
  for (int64_t d = 0; d < t.dim(); ++d) text += (d ? ", " : "") + std::to_string(t.size(d));
  return text + ")";
}

inline DType storage_type(const char* op, const char* argument, ScalarType type) {
  switch (type) {
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::BFloat16: return DType::kBFloat16;
    case ScalarType::Half: return DType::kFloat16;
    default: fail(op, argument, " must be float32, bfloat16 or float16, got scalar type ", static_cast<int>(type));
  }
}

// The storage type of an activation.
inline DType check_activation(const char* op, const Tensor& x) {
  MNV2_CHECK(x.dim() == 4, op, "x must have 4 dimensions (n, c, h, w), got ", describe(x));
  return storage_type(op, "x", x.scalar_type());
}

// Dense in the order n, h, w, c; dimensions of size 1 may have any stride.
inline void check_channels_last(const char* op, const Tensor& x) {
  const int64_t order[] = {1, 3, 2, 0};
  int64_t expected = 1;
  for (const int64_t d : order) {
    MNV2_CHECK(x.numel() == 0 || x.size(d) == 1 || x.stride(d) == expected, op,
               "x must be dense in channels_last order, got stride ", x.stride(d), " along dimension ", d, " of ",
               describe(x));
    expected *= x.size(d);
  }
}

// A contiguous fp32 tensor of the given size on the CPU or, where given, on the device of `beside`.
inline const float* check_weight(const char* op, const char* argument, const Tensor& t,
                                 const std::vector<int64_t>& sizes, const Tensor* beside = nullptr) {
  bool same = t.dim() == static_cast<int64_t>(sizes.size());
  std::string text;
  for (size_t d = 0; d < sizes.size(); ++d) {
    text += (d ? ", " : "") + std::to_string(sizes[d]);
    same = same && t.size(static_cast<int64_t>(d)) == sizes[d];
  }
  MNV2_CHECK(same, op, argument, " must have shape (", text, "), got ", describe(t));
  MNV2_CHECK(beside ? t.is_cuda() && t.get_device_index() == beside->get_device_index() : t.is_cpu(), op, argument,
             beside ? " must be on the device of the other tensors" : " must be on the CPU");
  MNV2_CHECK(t.is_contiguous() && t.scalar_type() == ScalarType::Float, op, argument,
             " must be a contiguous float32 tensor");
  return t.const_data_ptr<float>();
}

inline const float* check_packed(const char* op, const Tensor& packed, int64_t size) {
  MNV2_CHECK(packed.is_cpu() && packed.dim() == 1 && packed.is_contiguous() &&
                 packed.scalar_type() == ScalarType::Float && packed.numel() == size,
             op, "packed must come from the matching pack operator (", size,
             " contiguous float32 values for these channels on this machine), got ", describe(packed));
  return packed.const_data_ptr<float>();
}

template <class Shape>
void check_shape(const char* op, const Shape& shape) {
  if (const char* rule = broken_rule(shape)) fail(op, rule);
}

inline void check_padding(const char* op, const std::vector<int64_t>& padding) {
  MNV2_CHECK(padding.size() == 4, op, "padding must be (top, left, bottom, right), got ", padding.size(), " values");
}

}  // namespace mnv2
