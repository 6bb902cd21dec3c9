// The inference operators on CUDA: tensors to pointers, checks, plans, launches. Nothing here waits for the device, and
// all memory comes from torch's allocator, so that every operator can be captured in a graph.
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>

#include <array>
#include <map>
#include <mutex>
#include <optional>

#include "../check.h"
#include "../cpu/network.h"
#include "launch.h"
#include "stream.h"

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

Device ask_device(const char* op, int index) {
  const auto ask = [&](cudaDeviceAttr attribute) {
    int value = 0;
    const cudaError_t error = cudaDeviceGetAttribute(&value, attribute, index);
    MNV2_CHECK(error == cudaSuccess, op, "CUDA does not tell about device ", index, ": ", cudaGetErrorName(error));
    return int64_t{value};
  };
  int compiled_for = 0;
  const char* error = kHalfKernels.compiled_for(&compiled_for);
  MNV2_CHECK(!error, op, "no kernel was compiled for device ", index, ": ", error);
  return {ask(cudaDevAttrMultiProcessorCount), ask(cudaDevAttrMaxSharedMemoryPerBlockOptin),
          ask(cudaDevAttrMaxSharedMemoryPerMultiprocessor), compiled_for >= 90};
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
    stream_.handle = current_stream(index_);
    stream_.dependent_launch = device_.dependent_launch;
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

  void clear(void* data, int64_t size) const {
    if (size > 0) check(cudaMemsetAsync(data, 0, static_cast<size_t>(size), static_cast<cudaStream_t>(stream_.handle)));
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

unsigned char* bytes_of(const Tensor& t) { return static_cast<unsigned char*>(t.mutable_data_ptr()); }

const unsigned char* check_packed(const char* op, const Tensor& packed, const Tensor& x, int64_t size) {
  MNV2_CHECK(packed.is_cuda() && x.is_cuda() && packed.get_device_index() == x.get_device_index(), op,
             "x and packed must be on the same device");
  MNV2_CHECK(
      packed.dim() == 1 && packed.is_contiguous() && packed.scalar_type() == ScalarType::Byte && packed.numel() == size,
      op, "packed must come from the matching pack operator for this dtype (", size,
      " contiguous bytes for these channels), got ", describe(packed));
  return static_cast<const unsigned char*>(packed.const_data_ptr());
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
  check_shape(op, StemShape{0, kernel, kernel, c_in, c_out, kernel, 1, 0, 0, 0, 0, 0.f, 0.f});
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
    check_packed(op, t, packed[0], t.numel());
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

// ---------------------------------------------------------------------------------------------------------- plans

// Plans are looked for among many tiles: once for each shape, number of images, dtype and device.
BlockPlan plan(const char* op, const BlockShape& s, DType dtype, const Device& device) {
  using Key = std::array<int64_t, 18>;
  constexpr size_t kMost = 4096;
  static std::mutex mutex;
  static std::map<Key, BlockPlan> plans;
  const Key key{s.n,
                s.h,
                s.w,
                s.c_in,
                s.c_hidden,
                s.c_out,
                s.kernel,
                s.stride,
                s.dilation,
                s.pad_top,
                s.pad_left,
                s.pad_bottom,
                s.pad_right,
                s.has_expand,
                static_cast<int64_t>(dtype),
                device.multiprocessors,
                device.shared_block,
                device.shared_all};
  const std::scoped_lock lock(mutex);
  auto known = plans.find(key);
  if (known == plans.end()) {
    if (plans.size() >= kMost) plans.clear();
    known = plans.emplace(key, plan_block(s, dtype, device)).first;
  }
  MNV2_CHECK(known->second.fits, op, "no tile of this block fits into the shared memory of the device (",
             device.shared_block, " bytes): ", s.c_in, " channels in, ", s.c_hidden, " hidden, kernel ", s.kernel,
             ", dilation ", s.dilation);
  return known->second;
}

WindowArgs with_images(WindowArgs window, const Tensor& x) {
  window.x = x.const_data_ptr();
  window.stride_n = x.stride(0), window.stride_c = x.stride(1);
  window.stride_h = x.stride(2), window.stride_w = x.stride(3);
  return window;
}

void check_stem_size(const char* op, const StemShape& s) {
  const int64_t area = h_out(s) * w_out(s);
  MNV2_CHECK(area < int64_t{1} << 31 && s.n * divide_up(area, kStemPixels) < int64_t{1} << 31, op,
             "a stem's output must have fewer than 2^31 pixels an image, got ", h_out(s), " x ", w_out(s), " in ", s.n,
             " images");
}

bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// `partial` and `tickets`: memory for what the plan asks for, tickets cleared.
void launch_block(const Context& context, const KernelTable& table, const BlockPlan& plan, BlockArgs& args,
                  void* partial, void* tickets) {
  args.partial = static_cast<float*>(partial);
  args.tickets = static_cast<uint32_t*>(tickets);
  args.vectors_in = args.vectors_in && aligned(args.x);
  args.vectors_out = args.vectors_out && aligned(args.y);
  context.check(table.block(args, plan, context.stream()));
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
  Tensor y = context.empty({s.n, c_out, h_out(s), w_out(s)}, x.scalar_type(), true);
  if (s.n == 0) return y;
  const BlockPlan plan = cuda::plan(op, s, dtype, context.device());
  BlockArgs args = block_args(s, plan, dtype);
  args.x = x.const_data_ptr(), args.y = y.mutable_data_ptr();
  args.packed = weights, args.expand = weights + args.first;
  const int64_t partial = round_up(plan.partial * 4, 256);
  Tensor shared = context.bytes(partial + plan.tickets * 4);
  context.clear(bytes_of(shared) + partial, plan.tickets * 4);
  launch_block(context, kernels(dtype, tf32), plan, args, bytes_of(shared), bytes_of(shared) + partial);
  return y;
}

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
  check_stem_size(op, s);
  StemArgs args = stem_args(s, dtype);
  args.packed = check_packed(op, packed, x, matrix_size(s.c_in * kernel * kernel, c_out, dtype));
  const Context context(op, x);
  Tensor y = context.empty({s.n, c_out, h_out(s), w_out(s)}, x.scalar_type(), true);
  if (s.n == 0) return y;
  args.window = with_images(args.window, x);
  args.y = y.mutable_data_ptr();
  context.check(kernels(dtype, tf32).stem(args, context.stream()));
  return y;
}

void launch_head(const Context& context, const KernelTable& table, const HeadShape& s, DType dtype, const void* x,
                 const unsigned char* packed, void* pooled, void* y) {
  PoolArgs pool = pool_args(s, dtype, context.device());
  pool.x = x, pool.packed = packed, pool.pooled = pooled;
  pool.vectors_in = pool.vectors_in && aligned(x);
  context.check(table.pool(pool, context.stream()));
  ClassifyArgs classify = classify_args(s, dtype);
  classify.pooled = pooled, classify.packed = packed + matrix_size(s.c_in, s.c_last, dtype), classify.y = y;
  context.check(table.classify(classify, context.stream()));
}

Tensor head(const Tensor& x, const Tensor& packed, int64_t c_last, int64_t num_classes, double lo, double hi,
            bool tf32) {
  const char* op = "head";
  const DType dtype = check_activation(op, x);
  const HeadShape s{
      x.size(0), x.size(2), x.size(3), x.size(1), c_last, num_classes, static_cast<float>(lo), static_cast<float>(hi)};
  check_shape(op, s);
  check_channels_last(op, x);
  const unsigned char* weights = check_packed(op, packed, x, head_size(s.c_in, c_last, num_classes, dtype));
  const Context context(op, x);
  Tensor y = context.empty({s.n, num_classes}, x.scalar_type());
  if (s.n == 0) return y;
  Tensor pooled = context.bytes(s.n * pooled_row(s) * element_bytes(dtype));
  launch_head(context, kernels(dtype, tf32), s, dtype, x.const_data_ptr(), weights, pooled.mutable_data_ptr(),
              y.mutable_data_ptr());
  return y;
}

// Memory that an operator's kernels share, laid out before it is asked for.
struct Arena {
  int64_t size = 0;

  int64_t add(int64_t bytes) {
    const int64_t at = size;
    size += round_up(bytes, 256);
    return at;
  }
};

int64_t map_bytes(const BlockShape& s, DType dtype) {
  return s.n * h_out(s) * w_out(s) * s.c_out * element_bytes(dtype);
}

Tensor network(const Tensor& x, const Tensor& packed, const std::vector<int64_t>& stem,
               const std::vector<int64_t>& blocks, const std::vector<int64_t>& head, const std::vector<double>& bounds,
               bool tf32) {
  const char* op = "network";
  const DType dtype = check_activation(op, x);
  std::string rule;
  const NetworkShape s = network_shape(x.size(0), x.size(2), x.size(3), x.size(1), {stem, blocks, head, bounds}, &rule);
  MNV2_CHECK(rule.empty(), op, rule);
  check_stem_size(op, s.stem);
  const int64_t window = s.stem.kernel * s.stem.kernel * s.stem.c_in,
                stem_size = matrix_size(window, s.stem.c_out, dtype);
  const auto packed_bytes = [&](const BlockShape& b) {
    return block_layout(b.has_expand ? b.c_in : 0, b.c_hidden, b.c_out, b.kernel, dtype).size;
  };
  int64_t size = stem_size + head_size(s.head.c_in, s.head.c_last, s.head.classes, dtype);
  for (const BlockShape& b : s.blocks) size += packed_bytes(b);
  const unsigned char* weights = check_packed(op, packed, x, size);
  const Context context(op, x);
  Tensor y = context.empty({s.stem.n, s.head.classes}, x.scalar_type());
  if (s.stem.n == 0) return y;

  // Maps alternate between two places.
  const bool join = !s.blocks.empty() && joins(s.stem, s.blocks[0]);
  std::vector<BlockPlan> plans;
  int64_t map[2] = {}, partial = 0, tickets = 0, step = 0;
  const auto add_map = [&](int64_t bytes) { map[step % 2] = std::max(map[step % 2], bytes), ++step; };
  if (!join) add_map(s.stem.n * h_out(s.stem) * w_out(s.stem) * s.stem.c_out * element_bytes(dtype));
  for (const BlockShape& b : s.blocks) {
    const bool first = plans.empty() && join;
    plans.push_back(plan(op, first ? joined(s.stem, b) : b, dtype, context.device()));
    partial = std::max(partial, plans.back().partial * 4);
    tickets += plans.back().tickets * 4;
    add_map(map_bytes(b, dtype));
  }
  Arena arena;
  const int64_t maps[2] = {arena.add(map[0]), arena.add(map[1])};
  const int64_t partial_at = arena.add(partial), tickets_at = arena.add(tickets);
  const int64_t pooled_at = arena.add(s.stem.n * pooled_row(s.head) * element_bytes(dtype));
  Tensor memory = context.bytes(arena.size);
  unsigned char* const base = bytes_of(memory);
  context.clear(base + tickets_at, tickets);

  const KernelTable& table = kernels(dtype, tf32);
  const unsigned char* const stem_weights = weights;
  weights += stem_size;
  const void* in = nullptr;
  step = 0;
  if (!join) {
    StemArgs args = stem_args(s.stem, dtype);
    args.window = with_images(args.window, x);
    args.packed = stem_weights, args.y = base + maps[0];
    context.check(table.stem(args, context.stream()));
    in = args.y;
    ++step;
  }
  unsigned char* ticket = base + tickets_at;
  for (size_t i = 0; i < s.blocks.size(); ++i, ++step) {
    const BlockShape& b = s.blocks[i];
    BlockArgs args;
    if (i == 0 && join) {
      args = joined_args(s.stem, joined(s.stem, b), plans[i], dtype);
      args.window = with_images(args.window, x);
      args.expand = stem_weights;
    } else {
      args = block_args(b, plans[i], dtype);
      args.x = in;
      args.expand = weights + args.first;
    }
    args.packed = weights, args.y = base + maps[step % 2];
    launch_block(context, table, plans[i], args, base + partial_at, ticket);
    ticket += plans[i].tickets * 4;
    weights += packed_bytes(b);
    in = args.y;
  }
  launch_head(context, table, s.head, dtype, in, weights, base + pooled_at, y.mutable_data_ptr());
  return y;
}

}  // namespace

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
