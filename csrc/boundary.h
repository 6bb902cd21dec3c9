// The operators' door, for both backends: checks arguments and turns tensors and integers into pointers and shapes.
// Every error names operator, argument, rule and what was got.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "network.h"

namespace mnv2 {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The operator's name, then the parts one after the other.
template <class... Parts>
std::string message_of(const char* op, const Parts&... parts) {
  std::ostringstream message;
  message << "mnv2_fused::" << op << ": ";
  (message << ... << parts);
  return message.str();
}

template <class... Parts>
[[noreturn]] void fail(const char* op, const Parts&... parts) {
  throw std::invalid_argument(message_of(op, parts...));
}

// A macro, so that the message is formatted only if the check fails.
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

// `untyped_storage().resize_()` can free a tensor's memory or make it smaller than the tensor. Such memory must not be
// read. Throws std::runtime_error, as PyTorch's own operators do.
inline void check_memory(const char* op, const char* argument, const Tensor& t) {
  if (t.numel() == 0) return;
  int64_t last = t.storage_offset(), bytes = 0;  // last: index of the last element
  for (int64_t d = 0; d < t.dim(); ++d) last += (t.size(d) - 1) * t.stride(d);
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(t.get(), &bytes));
  if ((last + 1) * static_cast<int64_t>(t.element_size()) <= bytes && t.const_data_ptr()) return;
  throw std::runtime_error(message_of(op, argument, " must have memory for all its elements, got ", describe(t),
                                      " in a storage of ", bytes, " bytes: its data is not allocated"));
}

// Checks the activation x and returns its storage type.
inline DType check_activation(const char* op, const Tensor& x) {
  MNV2_CHECK(x.dim() == 4, op, "x must have 4 dimensions (n, c, h, w), got ", describe(x));
  check_memory(op, "x", x);
  return storage_type(op, "x", x.scalar_type());
}

// x must be dense in the order n, h, w, c. Dimensions of size 1 may have any stride.
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

// `t` must be a contiguous fp32 tensor of these sizes on the CPU or, if `beside` is given, on the device of `beside`.
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
  check_memory(op, argument, t);
  return t.const_data_ptr<float>();
}

// `packed` must be `size` contiguous bytes on the CPU or, if `beside` is given, on the device of `beside`.
inline const void* check_packed(const char* op, const Tensor& packed, int64_t size, const Tensor* beside = nullptr) {
  MNV2_CHECK(beside ? packed.is_cuda() && beside->is_cuda() && packed.get_device_index() == beside->get_device_index()
                    : packed.is_cpu(),
             op, beside ? "x and packed must be on the same device" : "packed must be on the CPU");
  MNV2_CHECK(
      packed.dim() == 1 && packed.is_contiguous() && packed.scalar_type() == ScalarType::Byte && packed.numel() == size,
      op, "packed must come from the matching pack operator (", size,
      " contiguous bytes for these channels and this dtype here), got ", describe(packed));
  check_memory(op, "packed", packed);
  const auto address = reinterpret_cast<uintptr_t>(packed.const_data_ptr());
  MNV2_CHECK(address % 16 == 0, op, "packed must be aligned to 16 bytes, got a view that begins ", address % 16,
             " bytes behind such an address");
  return packed.const_data_ptr();
}

template <class Shape>
void check_shape(const char* op, const Shape& shape) {
  if (const char* rule = broken_rule(shape)) fail(op, rule);
}

// ------------------------------------------------------------------------------------------------ operators' integers

inline Images images_of(const Tensor& x) {
  return {x.const_data_ptr(), {x.stride(0), x.stride(1), x.stride(2), x.stride(3)}};
}

inline ImageSize size_of(const Tensor& x) { return {x.size(0), x.size(2), x.size(3), x.size(1)}; }

// The activation whose bounds begin at bounds[2 * i].
inline Activation activation_at(const std::vector<double>& bounds, size_t i) {
  return {static_cast<float>(bounds[2 * i]), static_cast<float>(bounds[2 * i + 1])};
}

inline Activation check_bounds(const char* op, const std::vector<double>& bounds) {
  MNV2_CHECK(bounds.size() == 2, op, "bounds must be (lo, hi), got ", bounds.size(), " values");
  return activation_at(bounds, 0);
}

template <size_t size>
void check_fields(const char* op, const char* argument, const std::vector<int64_t>& values,
                  const char* const (&fields)[size]) {
  if (values.size() == size) return;
  std::string names;
  for (const char* field : fields) names.append(names.empty() ? "" : ", ").append(field);
  fail(op, argument, " must be (", names, "), got ", values.size(), " values");
}

inline BlockShape block_shape(const char* op, const Tensor& x, const std::vector<int64_t>& block,
                              const std::vector<double>& bounds) {
  check_fields(op, "block", block, kBlockFields);
  MNV2_CHECK(bounds.size() == 4, op, "bounds must be (lo, hi, lo of the output, hi of the output), got ", bounds.size(),
             " values");
  const BlockShape s = block_from(size_of(x), block.data(), activation_at(bounds, 0), activation_at(bounds, 1));
  check_shape(op, s);
  return s;
}

inline DenseShape dense_shape(const char* op, const Tensor& x, const std::vector<int64_t>& dense,
                              const std::vector<double>& bounds) {
  check_fields(op, "dense", dense, kDenseFields);
  const DenseShape s = dense_from(size_of(x), dense.data(), check_bounds(op, bounds));
  check_shape(op, s);
  return s;
}

inline HeadShape head_shape(const char* op, const Tensor& x, const std::vector<int64_t>& head,
                            const std::vector<double>& bounds) {
  check_fields(op, "head", head, kHeadFields);
  const HeadShape s = head_from(size_of(x), head.data(), check_bounds(op, bounds));
  check_shape(op, s);
  return s;
}

inline NetworkShape network_shape(const char* op, const Tensor& x, const NetworkArguments& arguments) {
  std::string rule;
  const NetworkShape s = network_from(size_of(x), arguments, &rule);
  MNV2_CHECK(rule.empty(), op, rule);
  return s;
}

// The outputs of a network in the order of its units, and their memory.
struct NetworkOutputs {
  std::vector<Tensor> tensors;
  std::vector<void*> data;
};

// empty(sizes, channels_last): a new tensor.
template <class Empty>
NetworkOutputs new_outputs(const NetworkShape& s, const Empty& empty) {
  NetworkOutputs outputs;
  for (const NetworkUnit& unit : s.units) {
    if (!unit.tap) continue;
    const ImageSize size = output_of(unit);
    const bool is_map = unit.kind != UnitKind::kHead;
    outputs.tensors.push_back(is_map ? empty({size.n, size.c, size.h, size.w}, true) : empty({size.n, size.c}, false));
    outputs.data.push_back(outputs.tensors.back().mutable_data_ptr());
  }
  return outputs;
}

// -------------------------------------------------------------------------------------------------- weights to pack

// A convolution's weight and bias, fp32. Both are null if there is no such convolution.
struct WeightAndBias {
  const float *weight, *bias;
};

// A block's weights. `s` is the smallest block that has weights of these sizes.
struct BlockTensors {
  BlockShape s;
  WeightAndBias expand, depthwise, project;
};

inline BlockTensors check_block_weights(const char* op, const OptionalTensor& expand_weight,
                                        const OptionalTensor& expand_bias, const Tensor& depthwise_weight,
                                        const Tensor& depthwise_bias, const Tensor& project_weight,
                                        const Tensor& project_bias, const Tensor* beside = nullptr) {
  MNV2_CHECK(depthwise_weight.dim() == 4 && project_weight.dim() == 4, op,
             "depthwise_weight and project_weight must have 4 dimensions, got ", describe(depthwise_weight), " and ",
             describe(project_weight));
  MNV2_CHECK(expand_weight.has_value() == expand_bias.has_value(), op,
             "expand_weight and expand_bias must be given together");
  MNV2_CHECK(!expand_weight || expand_weight->dim() == 4, op, "expand_weight must have 4 dimensions");
  const int64_t c_hidden = depthwise_weight.size(0), kernel = depthwise_weight.size(2), c_out = project_weight.size(0);
  const int64_t c_in = expand_weight ? expand_weight->size(1) : c_hidden;
  BlockTensors w{block_of_weights(c_in, c_hidden, c_out, kernel, expand_weight.has_value()), {}, {}, {}};
  check_shape(op, w.s);
  if (expand_weight) {
    w.expand = {check_weight(op, "expand_weight", *expand_weight, {c_hidden, c_in, 1, 1}, beside),
                check_weight(op, "expand_bias", *expand_bias, {c_hidden}, beside)};
  }
  w.depthwise = {check_weight(op, "depthwise_weight", depthwise_weight, {c_hidden, 1, kernel, kernel}, beside),
                 check_weight(op, "depthwise_bias", depthwise_bias, {c_hidden}, beside)};
  w.project = {check_weight(op, "project_weight", project_weight, {c_out, c_hidden, 1, 1}, beside),
               check_weight(op, "project_bias", project_bias, {c_out}, beside)};
  return w;
}

struct DenseTensors {
  DenseShape s;
  WeightAndBias conv;
};

inline DenseTensors check_dense_weights(const char* op, const Tensor& weight, const Tensor& bias,
                                        const Tensor* beside = nullptr) {
  MNV2_CHECK(weight.dim() == 4, op, "weight must have 4 dimensions, got ", describe(weight));
  const int64_t c_out = weight.size(0), c_in = weight.size(1), kernel = weight.size(2);
  DenseTensors w{dense_of_weights(c_in, c_out, kernel), {}};
  check_shape(op, w.s);
  w.conv = {check_weight(op, "weight", weight, {c_out, c_in, kernel, kernel}, beside),
            check_weight(op, "bias", bias, {c_out}, beside)};
  return w;
}

struct HeadTensors {
  HeadShape s;
  WeightAndBias conv, classifier;
};

inline HeadTensors check_head_weights(const char* op, const Tensor& conv_weight, const Tensor& conv_bias,
                                      const Tensor& classifier_weight, const Tensor& classifier_bias,
                                      const Tensor* beside = nullptr) {
  MNV2_CHECK(conv_weight.dim() == 4 && classifier_weight.dim() == 2, op,
             "conv_weight must have 4 dimensions and classifier_weight 2, got ", describe(conv_weight), " and ",
             describe(classifier_weight));
  const int64_t c_last = conv_weight.size(0), c_in = conv_weight.size(1), classes = classifier_weight.size(0);
  HeadTensors w{head_of_weights(c_in, c_last, classes), {}, {}};
  check_shape(op, w.s);
  w.conv = {check_weight(op, "conv_weight", conv_weight, {c_last, c_in, 1, 1}, beside),
            check_weight(op, "conv_bias", conv_bias, {c_last}, beside)};
  w.classifier = {check_weight(op, "classifier_weight", classifier_weight, {classes, c_last}, beside),
                  check_weight(op, "classifier_bias", classifier_bias, {classes}, beside)};
  return w;
}

}  // namespace mnv2
