// The inference operators on CUDA: tensors to pointers, checks, plans, launches. Nothing here waits for the device, and
// all memory comes from torch's allocator, so that every operator can be captured in a graph.
#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <map>
#include <mutex>
#include <optional>

#include "../check.h"
#include "run.h"

// A torch without CUDA lacks it, and does to build with; all else that is missing is an error at link.
#pragma weak aoti_torch_get_current_cuda_stream

namespace mnv2 {
namespace cuda {
namespace {

using OptionalTensor = std::optional<Tensor>;

const KernelTable& kernels(DType dtype, bool tf32) {
  switch (dtype) {
    case DType::kFloat16: return kHalfKernels;
    case DType::kBFloat16: return kBFloat16Kernels;
    default: return tf32 ? kTf32Kernels : kFloatKernels;
  }
}

constexpr int kCapturesDependent = 12030;  // the first driver with dependent launches in graphs

Device ask_device(const char* op, int index) {
  const auto ask = [&](cudaDeviceAttr attribute) {
    int value = 0;
    const cudaError_t error = cudaDeviceGetAttribute(&value, attribute, index);
    MNV2_CHECK(error == cudaSuccess, op, "CUDA does not tell about device ", index, ": ", cudaGetErrorName(error));
    return int64_t{value};
  };
  int compiled_for = 0, driver = 0;
  const char* error = kHalfKernels.compiled_for(&compiled_for);
  MNV2_CHECK(!error, op, "no kernel of this build runs on device ", index, ": CUDA reports ", error);
  if (cudaDriverGetVersion(&driver) != cudaSuccess) driver = 0;
  return {ask(cudaDevAttrMultiProcessorCount), ask(cudaDevAttrMaxSharedMemoryPerBlockOptin),
          ask(cudaDevAttrMaxSharedMemoryPerMultiprocessor), compiled_for >= 90 && driver >= kCapturesDependent};
}

unsigned char* bytes_of(const Tensor& t) { return static_cast<unsigned char*>(t.mutable_data_ptr()); }

// Of the library's kernels: the error with which the device refuses them, or nothing.
std::string cuda_kernels_refused(int64_t device) {
  const torch::stable::accelerator::DeviceGuard guard(static_cast<int>(device));
  int compiled_for = 0;
  const char* error = kHalfKernels.compiled_for(&compiled_for);
  return error ? error : "";
}

// The device of an operator's tensors, made the current one, and its current stream.
class Context {
 public:
  Context(const char* op, const Tensor& x) : op_(op), index_(x.get_device_index()), guard_(index_) {
    static std::mutex mutex;
    static std::map<int, Device> devices;
    const std::scoped_lock lock(mutex);
    auto known = devices.find(index_);
    if (known == devices.end()) known = devices.emplace(index_, ask_device(op, index_)).first;
    device_ = known->second;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream_.handle));
    stream_.dependent_launch = device_.dependent_launch;
    stream_.shared_block = device_.shared_block;
  }

  const Device& device() const { return device_; }
  Stream stream() const { return stream_; }

  Tensor empty(const std::vector<int64_t>& sizes, ScalarType dtype, bool channels_last = false) const {
    std::optional<torch::headeronly::MemoryFormat> format;
    if (channels_last) format = torch::headeronly::MemoryFormat::ChannelsLast;
    const torch::stable::Device device(torch::headeronly::DeviceType::CUDA, index_);
    return torch::stable::empty(sizes, dtype, std::nullopt, device, std::nullopt, format);
  }
  Tensor bytes(int64_t size) const { return empty({size}, ScalarType::Byte); }
  Tensor memory(const Memory& needed) const {
    Tensor t = bytes(needed.size);
    if (needed.tickets > 0) {
      unsigned char* const tickets = bytes_of(t) + needed.size - needed.tickets;
      check(
          cudaMemsetAsync(tickets, 0, static_cast<size_t>(needed.tickets), static_cast<cudaStream_t>(stream_.handle)));
    }
    return t;
  }
  void check(cudaError_t error) const { check(error == cudaSuccess ? nullptr : cudaGetErrorName(error)); }
  void check(const char* error) const { MNV2_CHECK(!error, op_, "CUDA reports ", error); }

 private:
  const char* op_;
  int index_;
  torch::stable::accelerator::DeviceGuard guard_;
  Device device_;
  Stream stream_{};
};

// -------------------------------------------------------------------------------------------------------- packing

const unsigned char* check_packed(const char* op, const Tensor& packed, const Tensor& x, int64_t size) {
  MNV2_CHECK(packed.is_cuda() && x.is_cuda() && packed.get_device_index() == x.get_device_index(), op,
             "x and packed must be on the same device");
  MNV2_CHECK(
      packed.dim() == 1 && packed.is_contiguous() && packed.scalar_type() == ScalarType::Byte && packed.numel() == size,
      op, "packed must come from the matching pack operator for this dtype (", size,
      " contiguous bytes for these channels), got ", describe(packed));
  const unsigned char* data = static_cast<const unsigned char*>(packed.const_data_ptr());
  MNV2_CHECK(reinterpret_cast<uintptr_t>(data) % 16 == 0, op,
             "packed must be aligned to 16 bytes, got a view that begins ", reinterpret_cast<uintptr_t>(data) % 16,
             " bytes behind such an address");
  return data;
}

void pack(const Context& context, DType dtype, PackArgs args, unsigned char* packed) {
  args.packed = packed;
  context.check(kernels(dtype, false).pack(args, context.stream()));
}

Tensor pack_block(const OptionalTensor& expand_weight, const OptionalTensor& expand_bias,
                  const Tensor& depthwise_weight, const Tensor& depthwise_bias, const Tensor& project_weight,
                  const Tensor& project_bias, ScalarType scalar_type) {
  const char* op = "pack_block";
  const DType dtype = storage_type(op, "dtype", scalar_type);
  MNV2_CHECK(depthwise_weight.dim() == 4 && project_weight.dim() == 4, op,
             "depthwise_weight and project_weight must have 4 dimensions, got ", describe(depthwise_weight), " and ",
             describe(project_weight));
  MNV2_CHECK(expand_weight.has_value() == expand_bias.has_value(), op,
             "expand_weight and expand_bias must be given together");
  MNV2_CHECK(!expand_weight || expand_weight->dim() == 4, op, "expand_weight must have 4 dimensions");
  const Tensor& first = depthwise_weight;
  const int64_t c_hidden = first.size(0), kernel = first.size(2), c_out = project_weight.size(0);
  const int64_t c_in = expand_weight ? expand_weight->size(1) : c_hidden;
  check_shape(op, BlockShape{0, kernel, kernel, c_in, c_hidden, c_out, kernel, 1, 1, 0, 0, 0, 0,
                             expand_weight.has_value(), false, 0.f, 0.f});
  const int64_t summed = expand_weight ? c_in : 0;
  PackArgs args = block_pack_args(summed, c_hidden, c_out, kernel, dtype);
  if (expand_weight) {
    args.expand = check_weight(op, "expand_weight", *expand_weight, {c_hidden, c_in, 1, 1}, &first);
    args.expand_bias = check_weight(op, "expand_bias", *expand_bias, {c_hidden}, &first);
  }
  args.depthwise = check_weight(op, "depthwise_weight", depthwise_weight, {c_hidden, 1, kernel, kernel}, &first);
  args.depthwise_bias = check_weight(op, "depthwise_bias", depthwise_bias, {c_hidden}, &first);
  args.project = check_weight(op, "project_weight", project_weight, {c_out, c_hidden, 1, 1}, &first);
  args.project_bias = check_weight(op, "project_bias", project_bias, {c_out}, &first);
  const Context context(op, first);
  Tensor packed = context.bytes(block_layout(summed, c_hidden, c_out, kernel, dtype).size);
  pack(context, dtype, args, bytes_of(packed));
  return packed;
}

Tensor pack_stem(const Tensor& weight, const Tensor& bias, ScalarType scalar_type) {
  const char* op = "pack_stem";
  const DType dtype = storage_type(op, "dtype", scalar_type);
  MNV2_CHECK(weight.dim() == 4, op, "weight must have 4 dimensions, got ", describe(weight));
  const int64_t c_out = weight.size(0), c_in = weight.size(1), kernel = weight.size(2);
  const StemShape of_weights{0, kernel, kernel, c_in, c_out, kernel, 1, 0, 0, 0, 0, 0.f, 0.f};
  check_shape(op, of_weights);
  if (const std::string why = unfit(of_weights, dtype); !why.empty())
    fail(op, c_in, " channels with kernel ", kernel, " do not fit the GPU: ", why);
  PackArgs args = matrix_pack_args(c_in, kernel * kernel, c_out, dtype);
  args.expand = check_weight(op, "weight", weight, {c_out, c_in, kernel, kernel}, &weight);
  args.expand_bias = check_weight(op, "bias", bias, {c_out}, &weight);
  const Context context(op, weight);
  Tensor packed = context.bytes(matrix_size(c_in * kernel * kernel, c_out, dtype));
  pack(context, dtype, args, bytes_of(packed));
  return packed;
}

Tensor pack_head(const Tensor& conv_weight, const Tensor& conv_bias, const Tensor& classifier_weight,
                 const Tensor& classifier_bias, ScalarType scalar_type) {
  const char* op = "pack_head";
  const DType dtype = storage_type(op, "dtype", scalar_type);
  MNV2_CHECK(conv_weight.dim() == 4 && classifier_weight.dim() == 2, op,
             "conv_weight must have 4 dimensions and classifier_weight 2, got ", describe(conv_weight), " and ",
             describe(classifier_weight));
  const int64_t c_last = conv_weight.size(0), c_in = conv_weight.size(1), classes = classifier_weight.size(0);
  check_shape(op, HeadShape{0, 1, 1, c_in, c_last, classes, 0.f, 0.f});
  const Tensor& first = conv_weight;
  PackArgs conv = matrix_pack_args(c_in, 1, c_last, dtype), classifier = matrix_pack_args(c_last, 1, classes, dtype);
  conv.expand = check_weight(op, "conv_weight", conv_weight, {c_last, c_in, 1, 1}, &first);
  conv.expand_bias = check_weight(op, "conv_bias", conv_bias, {c_last}, &first);
  classifier.expand = check_weight(op, "classifier_weight", classifier_weight, {classes, c_last}, &first);
  classifier.expand_bias = check_weight(op, "classifier_bias", classifier_bias, {classes}, &first);
  const Context context(op, first);
  Tensor packed = context.bytes(head_size(c_in, c_last, classes, dtype));
  pack(context, dtype, conv, bytes_of(packed));
  pack(context, dtype, classifier, bytes_of(packed) + matrix_size(c_in, c_last, dtype));
  return packed;
}

Tensor pack_network(const std::vector<Tensor>& packed) {
  const char* op = "pack_network";
  MNV2_CHECK(!packed.empty(), op, "packed must not be empty");
  int64_t size = 0;
  for (const Tensor& t : packed) {
    MNV2_CHECK(t.is_cuda() && t.get_device_index() == packed[0].get_device_index() && t.dim() == 1 &&
                   t.is_contiguous() && t.scalar_type() == ScalarType::Byte,
               op, "packed must be contiguous vectors of uint8 on one device, got ", describe(t));
    size += t.numel();
  }
  const Context context(op, packed[0]);
  Tensor whole = context.bytes(size);
  unsigned char* to = bytes_of(whole);
  for (const Tensor& t : packed) {
    context.check(cudaMemcpyAsync(to, t.const_data_ptr(), static_cast<size_t>(t.numel()), cudaMemcpyDeviceToDevice,
                                  static_cast<cudaStream_t>(context.stream().handle)));
    to += t.numel();
  }
  return whole;
}

// ------------------------------------------------------------------------------------------------------ operators

Tensor inverted_residual(const Tensor& x, const Tensor& packed, int64_t c_hidden, int64_t c_out, int64_t kernel,
                         int64_t stride, int64_t dilation, const std::vector<int64_t>& padding, bool has_expand,
                         bool residual, double lo, double hi, bool tf32) {
  const char* op = "inverted_residual";
  const DType dtype = check_activation(op, x);
  check_padding(op, padding);
  const BlockShape s{x.size(0),
                     x.size(2),
                     x.size(3),
                     x.size(1),
                     c_hidden,
                     c_out,
                     kernel,
                     stride,
                     dilation,
                     padding[0],
                     padding[1],
                     padding[2],
                     padding[3],
                     has_expand,
                     residual,
                     static_cast<float>(lo),
                     static_cast<float>(hi)};
  check_shape(op, s);
  check_channels_last(op, x);
  const unsigned char* weights =
      check_packed(op, packed, x, block_layout(has_expand ? s.c_in : 0, c_hidden, c_out, kernel, dtype).size);
  const Context context(op, x);
  const std::string why = unfit(s, dtype, context.device().shared_block);
  MNV2_CHECK(why.empty(), op, s.c_in, " to ", s.c_hidden, " to ", s.c_out, " channels with kernel ", s.kernel,
             " and dilation ", s.dilation, " do not fit the GPU for x ", describe(x), ": ", why);
  Tensor y = context.empty({s.n, c_out, h_out(s), w_out(s)}, x.scalar_type(), true);
  if (s.n == 0) return y;
  const BlockPlan plan = known_plan(s, dtype, context.device());
  Tensor memory = context.memory(block_memory(plan));
  context.check(run_block(kernels(dtype, tf32), s, plan, dtype, x.const_data_ptr(), weights, bytes_of(memory),
                          y.mutable_data_ptr(), context.stream()));
  return y;
}

Images images_of(const Tensor& x) { return {x.const_data_ptr(), {x.stride(0), x.stride(1), x.stride(2), x.stride(3)}}; }

Tensor stem(const Tensor& x, const Tensor& packed, int64_t c_out, int64_t kernel, int64_t stride,
            const std::vector<int64_t>& padding, double lo, double hi, bool tf32) {
  const char* op = "stem";
  const DType dtype = check_activation(op, x);
  check_padding(op, padding);
  const StemShape s{x.size(0),
                    x.size(2),
                    x.size(3),
                    x.size(1),
                    c_out,
                    kernel,
                    stride,
                    padding[0],
                    padding[1],
                    padding[2],
                    padding[3],
                    static_cast<float>(lo),
                    static_cast<float>(hi)};
  check_shape(op, s);
  if (const std::string why = unfit(s, dtype); !why.empty())
    fail(op, s.c_in, " to ", c_out, " channels with kernel ", kernel, " do not fit the GPU for x ", describe(x), ": ",
         why);
  const unsigned char* weights = check_packed(op, packed, x, matrix_size(s.c_in * kernel * kernel, c_out, dtype));
  const Context context(op, x);
  Tensor y = context.empty({s.n, c_out, h_out(s), w_out(s)}, x.scalar_type(), true);
  if (s.n == 0) return y;
  context.check(run_stem(kernels(dtype, tf32), s, dtype, context.device(), images_of(x), weights, y.mutable_data_ptr(),
                         context.stream()));
  return y;
}

Tensor head(const Tensor& x, const Tensor& packed, int64_t c_last, int64_t num_classes, double lo, double hi,
            bool tf32) {
  const char* op = "head";
  const DType dtype = check_activation(op, x);
  const HeadShape s{
      x.size(0), x.size(2), x.size(3), x.size(1), c_last, num_classes, static_cast<float>(lo), static_cast<float>(hi)};
  check_shape(op, s);
  if (const std::string why = unfit(s); !why.empty()) fail(op, "x ", describe(x), " does not fit the GPU: ", why);
  check_channels_last(op, x);
  const unsigned char* weights = check_packed(op, packed, x, head_size(s.c_in, c_last, num_classes, dtype));
  const Context context(op, x);
  Tensor y = context.empty({s.n, num_classes}, x.scalar_type());
  if (s.n == 0) return y;
  Tensor memory = context.memory(head_memory(s, dtype));
  context.check(run_head(kernels(dtype, tf32), s, dtype, context.device(), x.const_data_ptr(), weights,
                         bytes_of(memory), y.mutable_data_ptr(), context.stream()));
  return y;
}

Tensor network(const Tensor& x, const Tensor& packed, const std::vector<int64_t>& stem,
               const std::vector<int64_t>& blocks, const std::vector<int64_t>& head, const std::vector<double>& bounds,
               bool tf32) {
  const char* op = "network";
  const DType dtype = check_activation(op, x);
  std::string rule;
  const NetworkShape s = network_shape(x.size(0), x.size(2), x.size(3), x.size(1), {stem, blocks, head, bounds}, &rule);
  MNV2_CHECK(rule.empty(), op, rule);
  const unsigned char* weights = check_packed(op, packed, x, network_size(s, dtype));
  const Context context(op, x);
  if (const std::string why = unfit(s, dtype, context.device().shared_block); !why.empty())
    fail(op, "a unit does not fit the GPU for x ", describe(x), ": ", why);
  Tensor y = context.empty({s.stem.n, s.head.classes}, x.scalar_type());
  if (s.stem.n == 0) return y;
  const NetworkPlan plan = plan_network(s, dtype, context.device());
  Tensor memory = context.memory(plan.memory);
  context.check(run_network(kernels(dtype, tf32), s, plan, dtype, context.device(), images_of(x), weights,
                            bytes_of(memory), y.mutable_data_ptr(), context.stream()));
  return y;
}

}  // namespace

// It has no tensor to be dispatched by.
STABLE_TORCH_LIBRARY_IMPL(mnv2_fused, CompositeExplicitAutograd, m) {
  m.impl("cuda_kernels_refused", TORCH_BOX(&cuda_kernels_refused));
}

STABLE_TORCH_LIBRARY_IMPL(mnv2_fused, CUDA, m) {
  m.impl("pack_block", TORCH_BOX(&pack_block));
  m.impl("inverted_residual", TORCH_BOX(&inverted_residual));
  m.impl("pack_stem", TORCH_BOX(&pack_stem));
  m.impl("stem", TORCH_BOX(&stem));
  m.impl("pack_head", TORCH_BOX(&pack_head));
  m.impl("head", TORCH_BOX(&head));
  m.impl("pack_network", TORCH_BOX(&pack_network));
  m.impl("network", TORCH_BOX(&network));
}

}  // namespace cuda
}  // namespace mnv2
