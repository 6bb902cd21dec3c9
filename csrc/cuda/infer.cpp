// The inference operators on CUDA: check arguments, plan, and launch kernels. Nothing here waits for the device, and
// all memory comes from torch's allocator, so that every operator can be captured in a CUDA graph.
#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>
#include <cstdlib>
#include <map>
#include <mutex>
#include <set>
#include <utility>

#include "../boundary.h"
#include "../plan_cache.h"
#include "arguments.h"
#include "run.h"
#include "tiles.h"

// Weak, because a torch without CUDA lacks this symbol and the kernels can be built against it nevertheless. Any other
// missing symbol is a link error.
#pragma weak aoti_torch_get_current_cuda_stream

namespace mnv2 {
namespace cuda {
namespace {

const KernelTable& kernel_table(DType dtype, bool tf32) {
  switch (dtype) {
    case DType::kFloat16: return kHalfKernels;
    case DType::kBFloat16: return kBFloat16Kernels;
    default: return tf32 ? kTf32Kernels : kFloatKernels;
  }
}

constexpr int kCapturesDependent = 12030;  // the first driver that captures dependent launches in graphs

// Switches to tell apart what launches gain, without a rebuild: MNV2_FUSED_DEPENDENT_LAUNCH=0 starts each kernel after
// the one before; MNV2_FUSED_CARVEOUT is the percentage of L1 that kernels prefer as shared memory, -1 for the driver's
// choice.
int number_from_environment(const char* name, int otherwise) {
  const char* const text = std::getenv(name);
  return text ? std::atoi(text) : otherwise;
}

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
          ask(cudaDevAttrMaxSharedMemoryPerMultiprocessor), compiled_for >= 90 ? kMostCluster : 1,
          compiled_for >= 90 && driver >= kCapturesDependent &&
              number_from_environment("MNV2_FUSED_DEPENDENT_LAUNCH", 1) != 0};
}

// The operator's arguments as a key, and the shape and plan that follow from them.
struct NetworkKey {
  ImageSize x;
  NetworkArguments arguments;
  DType dtype;
  Device device;

  bool operator==(const NetworkKey&) const = default;
};
struct Network {
  NetworkShape shape;
  NetworkPlan plan;
};

unsigned char* bytes_of(const Tensor& t) { return static_cast<unsigned char*>(t.mutable_data_ptr()); }

// The error with which the device refuses the kernels of this build; "" if it runs them.
std::string cuda_kernels_refused(int64_t device) {
  const torch::stable::accelerator::DeviceGuard guard(static_cast<int>(device));
  int compiled_for = 0;
  const char* error = kHalfKernels.compiled_for(&compiled_for);
  return error ? error : "";
}

// Makes the device of an operator's tensors current while it lives, and holds that device's current stream.
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
  }

  const Device& device() const { return device_; }
  Stream stream() const { return stream_; }
  // Loaded on the device.
  const KernelTable& kernels(DType dtype, bool tf32) const {
    static std::mutex mutex;
    static std::set<std::pair<int, const KernelTable*>> loaded;
    const KernelTable& table = kernel_table(dtype, tf32);
    const std::scoped_lock lock(mutex);
    if (!loaded.contains({index_, &table})) {
      static const int carveout = number_from_environment("MNV2_FUSED_CARVEOUT", 100);
      check(table.load(device_.shared_block, carveout));
      loaded.emplace(index_, &table);
    }
    return table;
  }

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

const unsigned char* packed_bytes(const char* op, const Tensor& packed, const Tensor& x, int64_t size) {
  return static_cast<const unsigned char*>(check_packed(op, packed, size, &x));
}

void pack(const Context& context, DType dtype, PackArgs args, unsigned char* packed) {
  args.packed = packed;
  context.check(context.kernels(dtype, false).pack(args, context.stream()));
}

Tensor pack_block(const OptionalTensor& expand_weight, const OptionalTensor& expand_bias,
                  const Tensor& depthwise_weight, const Tensor& depthwise_bias, const Tensor& project_weight,
                  const Tensor& project_bias, ScalarType scalar_type) {
  const char* op = "pack_block";
  const DType dtype = storage_type(op, "dtype", scalar_type);
  const BlockTensors t = check_block_weights(op, expand_weight, expand_bias, depthwise_weight, depthwise_bias,
                                             project_weight, project_bias, &depthwise_weight);
  PackArgs args = block_pack_args(t.s.has_expand ? t.s.c_in : 0, t.s.c_hidden, t.s.c_out, t.s.kernel, dtype);
  args.expand = t.expand.weight, args.expand_bias = t.expand.bias;
  args.depthwise = t.depthwise.weight, args.depthwise_bias = t.depthwise.bias;
  args.project = t.project.weight, args.project_bias = t.project.bias;
  const Context context(op, depthwise_weight);
  Tensor packed = context.bytes(block_size(t.s, dtype));
  pack(context, dtype, args, bytes_of(packed));
  return packed;
}

// The packing of a matrix and its bias.
PackArgs pack_args(const WeightAndBias& matrix, int64_t channels, int64_t kernel, int64_t columns, DType dtype) {
  PackArgs args = matrix_pack_args(channels, kernel, columns, dtype);
  args.expand = matrix.weight, args.expand_bias = matrix.bias;
  return args;
}

Tensor pack_dense(const Tensor& weight, const Tensor& bias, ScalarType scalar_type) {
  const char* op = "pack_dense";
  const DType dtype = storage_type(op, "dtype", scalar_type);
  const auto& [s, conv] = check_dense_weights(op, weight, bias, &weight);
  if (const std::string why = unfit(s, dtype); !why.empty())
    fail(op, s.c_in, " channels with kernel ", s.kernel, " do not fit the GPU: ", why);
  const Context context(op, weight);
  Tensor packed = context.bytes(dense_size(s, dtype));
  pack(context, dtype, pack_args(conv, s.c_in, s.kernel, s.c_out, dtype), bytes_of(packed));
  return packed;
}

Tensor pack_head(const Tensor& conv_weight, const Tensor& conv_bias, const Tensor& classifier_weight,
                 const Tensor& classifier_bias, ScalarType scalar_type) {
  const char* op = "pack_head";
  const DType dtype = storage_type(op, "dtype", scalar_type);
  const auto& [s, conv, classifier] =
      check_head_weights(op, conv_weight, conv_bias, classifier_weight, classifier_bias, &conv_weight);
  const Context context(op, conv_weight);
  Tensor packed = context.bytes(head_size(s.c_in, s.c_last, s.classes, dtype));
  pack(context, dtype, pack_args(conv, s.c_in, 1, s.c_last, dtype), bytes_of(packed));
  pack(context, dtype, pack_args(classifier, s.c_last, 1, s.classes, dtype),
       bytes_of(packed) + matrix_size(s.c_in, s.c_last, dtype));
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

// plan_of(shape, dtype, device): how the block is cut up.
template <class Plan>
Tensor run_planned(const char* op, const Tensor& x, const Tensor& packed, const std::vector<int64_t>& block,
                   const std::vector<double>& bounds, bool tf32, const Plan& plan_of) {
  const DType dtype = check_activation(op, x);
  const BlockShape s = block_shape(op, x, block, bounds);
  check_channels_last(op, x);
  const unsigned char* weights = packed_bytes(op, packed, x, block_size(s, dtype));
  const Context context(op, x);
  const std::string why = unfit(s, dtype, context.device().shared_block);
  MNV2_CHECK(why.empty(), op, s.c_in, " to ", s.c_hidden, " to ", s.c_out, " channels with kernel ", s.kernel,
             " and dilation ", s.dilation, " do not fit the GPU for x ", describe(x), ": ", why);
  Tensor y = context.empty({s.n, s.c_out, h_out(s), w_out(s)}, x.scalar_type(), true);
  if (s.n == 0) return y;
  const BlockPlan plan = plan_of(s, dtype, context.device());
  Tensor memory = context.memory(block_memory(plan));
  context.check(run_block(context.kernels(dtype, tf32), s, plan, dtype, x.const_data_ptr(), weights, bytes_of(memory),
                          y.mutable_data_ptr(), context.stream()));
  return y;
}

Tensor inverted_residual(const Tensor& x, const Tensor& packed, const std::vector<int64_t>& block,
                         const std::vector<double>& bounds, bool tf32) {
  return run_planned(
      "inverted_residual", x, packed, block, bounds, tf32,
      [](const BlockShape& s, DType dtype, const Device& device) { return known_plan(s, dtype, device); });
}

Tensor inverted_residual_planned(const Tensor& x, const Tensor& packed, const std::vector<int64_t>& block,
                                 const std::vector<double>& bounds, bool tf32, const std::vector<int64_t>& tile) {
  const char* op = "inverted_residual_planned";
  ChosenTile chosen{};
  MNV2_CHECK(tile.size() == chosen.size(), op, "tile must have ", chosen.size(), " integers, got ", tile.size());
  std::copy(tile.begin(), tile.end(), chosen.begin());
  return run_planned(op, x, packed, block, bounds, tf32, [&](const BlockShape& s, DType dtype, const Device& device) {
    const BlockPlan plan = plan_chosen(s, dtype, device, chosen);
    MNV2_CHECK(plan.fits, op, "tile does not fit the GPU");
    return plan;
  });
}

Tensor dense(const Tensor& x, const Tensor& packed, const std::vector<int64_t>& dense,
             const std::vector<double>& bounds, bool tf32, const OptionalTensor& image_bias) {
  const char* op = "dense";
  const DType dtype = check_activation(op, x);
  const DenseShape s = dense_shape(op, x, dense, bounds);
  if (const std::string why = unfit(s, dtype); !why.empty())
    fail(op, s.c_in, " to ", s.c_out, " channels with kernel ", s.kernel, " do not fit the GPU for x ", describe(x),
         ": ", why);
  const unsigned char* weights = packed_bytes(op, packed, x, dense_size(s, dtype));
  const Context context(op, x);
  Tensor y = context.empty({s.n, s.c_out, h_out(s), w_out(s)}, x.scalar_type(), true);
  if (s.n == 0) return y;
  const float* biases = image_bias ? check_weight(op, "image_bias", *image_bias, {s.n, s.c_out}, &x) : nullptr;
  context.check(run_stem(context.kernels(dtype, tf32), s, dtype, context.device(), images_of(x), weights, biases,
                         y.mutable_data_ptr(), context.stream()));
  return y;
}

Tensor head(const Tensor& x, const Tensor& packed, const std::vector<int64_t>& head, const std::vector<double>& bounds,
            bool tf32) {
  const char* op = "head";
  const DType dtype = check_activation(op, x);
  const HeadShape s = head_shape(op, x, head, bounds);
  if (const std::string why = unfit(s); !why.empty()) fail(op, "x ", describe(x), " does not fit the GPU: ", why);
  check_channels_last(op, x);
  const unsigned char* weights = packed_bytes(op, packed, x, head_size(s.c_in, s.c_last, s.classes, dtype));
  const Context context(op, x);
  Tensor y = context.empty({s.n, s.classes}, x.scalar_type());
  if (s.n == 0) return y;
  Tensor memory = context.memory(head_memory(s, dtype));
  context.check(run_head(context.kernels(dtype, tf32), s, dtype, context.device(), x.const_data_ptr(), weights,
                         bytes_of(memory), y.mutable_data_ptr(), context.stream()));
  return y;
}

std::vector<Tensor> network(const Tensor& x, const Tensor& packed, const std::string& units, const std::string& bounds,
                            bool tf32) {
  const char* op = "network";
  const DType dtype = check_activation(op, x);
  const Context context(op, x);
  static PlanCache<NetworkKey, Network> networks(64);
  const NetworkKey key{size_of(x), {units, bounds}, dtype, context.device()};
  const std::shared_ptr<const Network> known = networks.get(key, [&] {
    Network network{network_shape(op, x, key.arguments), {}};
    if (const std::string why = unfit(network.shape, dtype, context.device().shared_block); !why.empty())
      fail(op, "a unit does not fit the GPU for x ", describe(x), ": ", why);
    if (x.size(0) > 0) network.plan = plan_network(network.shape, dtype, context.device());
    return network;
  });
  const NetworkShape& s = known->shape;
  const unsigned char* weights = packed_bytes(op, packed, x, network_size(s, dtype));
  NetworkOutputs outputs = new_outputs(s, [&](const std::vector<int64_t>& sizes, bool channels_last) {
    return context.empty(sizes, x.scalar_type(), channels_last);
  });
  if (x.size(0) == 0) return outputs.tensors;
  Tensor memory = context.memory(known->plan.memory);
  context.check(run_network(context.kernels(dtype, tf32), s, known->plan, dtype, context.device(), images_of(x),
                            weights, bytes_of(memory), outputs.data.data(), context.stream()));
  return outputs.tensors;
}

}  // namespace

// cuda_kernels_refused has no tensor argument to dispatch on.
STABLE_TORCH_LIBRARY_IMPL(mnv2_fused, CompositeExplicitAutograd, m) {
  m.impl("cuda_kernels_refused", TORCH_BOX(&cuda_kernels_refused));
}

STABLE_TORCH_LIBRARY_IMPL(mnv2_fused, CUDA, m) {
  m.impl("pack_block", TORCH_BOX(&pack_block));
  m.impl("inverted_residual", TORCH_BOX(&inverted_residual));
  m.impl("inverted_residual_planned", TORCH_BOX(&inverted_residual_planned));
  m.impl("pack_dense", TORCH_BOX(&pack_dense));
  m.impl("dense", TORCH_BOX(&dense));
  m.impl("pack_head", TORCH_BOX(&pack_head));
  m.impl("head", TORCH_BOX(&head));
  m.impl("pack_network", TORCH_BOX(&pack_network));
  m.impl("network", TORCH_BOX(&network));
}

}  // namespace cuda
}  // namespace mnv2
