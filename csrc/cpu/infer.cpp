// The inference operators on the CPU: check arguments, turn tensors into pointers, and run.
#include "infer.h"

#include "../introspect.h"
#include "../plan_cache.h"
#include "pack.h"
#include "run.h"
#include "tensors.h"

namespace mnv2 {
namespace {

// The operator's arguments as a key, and the shape and plan that follow from them.
struct NetworkKey {
  ImageSize x;
  NetworkArguments arguments;
  DType dtype;
  int64_t threads;

  bool operator==(const NetworkKey&) const = default;
};
struct Network {
  NetworkShape shape;
  NetworkPlan plan;
};

// A byte tensor for `floats` floats of packed weights. Large ones ask for huge pages: every image reads all weights of
// a network, which cover more small pages than the TLB holds.
Tensor empty_packed(int64_t floats) {
  const int64_t bytes = 4 * floats;
#ifdef MADV_HUGEPAGE
  constexpr int64_t kHuge = int64_t{2} << 20;
  if (bytes >= kHuge / 2) {
    Tensor whole = empty({round_up(bytes, kHuge) + kHuge}, ScalarType::Byte, false);
    char* data = static_cast<char*>(whole.mutable_data_ptr());
    const int64_t skip = (kHuge - reinterpret_cast<intptr_t>(data) % kHuge) % kHuge;
    advise_huge_pages(data + skip, round_up(bytes, kHuge));
    return torch::stable::narrow(whole, 0, skip, bytes);
  }
#endif
  return empty({bytes}, ScalarType::Byte, false);
}

float* packed_floats(Tensor& packed) { return static_cast<float*>(packed.mutable_data_ptr()); }

}  // namespace

Tensor pack_block_op(const OptionalTensor& expand_weight, const OptionalTensor& expand_bias,
                     const Tensor& depthwise_weight, const Tensor& depthwise_bias, const Tensor& project_weight,
                     const Tensor& project_bias, ScalarType) {
  const BlockTensors t = check_block_weights("pack_block", expand_weight, expand_bias, depthwise_weight, depthwise_bias,
                                             project_weight, project_bias);
  const BlockShape& s = t.s;
  std::vector<double> shifts[3];
  const auto shift = [&](int i, const float* bias, int64_t channels) {
    if (!bias) return BlockWeights::Norm{};
    shifts[i].assign(bias, bias + channels);
    return BlockWeights::Norm{nullptr, shifts[i].data()};
  };
  const BlockWeights w{.expand = t.expand.weight,
                       .depthwise = t.depthwise.weight,
                       .project = t.project.weight,
                       .expand_norm = shift(0, t.expand.bias, s.c_hidden),
                       .depthwise_norm = shift(1, t.depthwise.bias, s.c_hidden),
                       .project_norm = shift(2, t.project.bias, s.c_out)};
  const Lanes lanes = kernels().lanes;
  Tensor packed = empty_packed(block_size(s, lanes));
  pack_block(s.c_in, s.c_hidden, s.c_out, s.kernel, w, lanes, parallel_for, packed_floats(packed));
  return packed;
}

Tensor inverted_residual(const Tensor& x, const Tensor& packed, const std::vector<int64_t>& block,
                         const std::vector<double>& bounds, bool) {
  const char* op = "inverted_residual";
  const DType dtype = check_activation(op, x);
  const BlockShape s = block_shape(op, x, block, bounds);
  check_channels_last(op, x);
  const KernelTable& table = kernels();
  const float* weights = check_packed_floats(op, packed, block_size(s, table.lanes));
  Tensor y = new_map({s.n, s.c_out, h_out(s), w_out(s)}, x.scalar_type());
  run_block(table, this_machine(), s, dtype, x.const_data_ptr(), weights, y.mutable_data_ptr(), parallel_for);
  return y;
}

Tensor pack_dense_op(const Tensor& weight, const Tensor& bias, ScalarType) {
  const auto& [s, conv] = check_dense_weights("pack_dense", weight, bias);
  const Lanes lanes = kernels().lanes;
  Tensor packed = empty_packed(stem_size(s.c_in, s.c_out, s.kernel, lanes));
  pack_stem(s.c_in, s.c_out, s.kernel, conv.weight, conv.bias, lanes, packed_floats(packed));
  return packed;
}

// The biases of all images as run_stem() reads them.
static std::vector<float> padded_biases(const char* op, const DenseShape& s, const Tensor& bias) {
  const float* from = check_weight(op, "image_bias", bias, {s.n, s.c_out});
  std::vector<float> padded(static_cast<size_t>(s.n * image_bias_row(s)));
  for (int64_t i = 0; i < s.n; ++i) std::copy_n(from + i * s.c_out, s.c_out, padded.begin() + i * image_bias_row(s));
  return padded;
}

Tensor dense(const Tensor& x, const Tensor& packed, const std::vector<int64_t>& dense,
             const std::vector<double>& bounds, bool, const OptionalTensor& image_bias) {
  const char* op = "dense";
  const DType dtype = check_activation(op, x);
  const DenseShape s = dense_shape(op, x, dense, bounds);
  const KernelTable& table = kernels();
  const float* weights = check_packed_floats(op, packed, stem_size(s.c_in, s.c_out, s.kernel, table.lanes));
  Tensor y = new_map({s.n, s.c_out, h_out(s), w_out(s)}, x.scalar_type());
  const std::vector<float> biases = image_bias ? padded_biases(op, s, *image_bias) : std::vector<float>();
  run_stem(table, this_machine(), s, dtype, images_of(x), weights, image_bias ? biases.data() : nullptr,
           y.mutable_data_ptr(), parallel_for);
  return y;
}

Tensor pack_head_op(const Tensor& conv_weight, const Tensor& conv_bias, const Tensor& classifier_weight,
                    const Tensor& classifier_bias, ScalarType) {
  const auto& [s, conv, classifier] =
      check_head_weights("pack_head", conv_weight, conv_bias, classifier_weight, classifier_bias);
  const Lanes lanes = kernels().lanes;
  Tensor packed = empty_packed(head_size(s.c_in, s.c_last, s.classes, lanes));
  pack_head(s.c_in, s.c_last, s.classes, conv.weight, conv.bias, classifier.weight, classifier.bias, lanes,
            packed_floats(packed));
  return packed;
}

Tensor head(const Tensor& x, const Tensor& packed, const std::vector<int64_t>& head, const std::vector<double>& bounds,
            bool) {
  const char* op = "head";
  const DType dtype = check_activation(op, x);
  const HeadShape s = head_shape(op, x, head, bounds);
  check_channels_last(op, x);
  const KernelTable& table = kernels();
  const float* weights = check_packed_floats(op, packed, head_size(s.c_in, s.c_last, s.classes, table.lanes));
  Tensor y = empty({s.n, s.classes}, x.scalar_type(), false);
  run_head(table, this_machine(), s, dtype, x.const_data_ptr(), weights, y.mutable_data_ptr(), parallel_for);
  return y;
}

Tensor pack_network(const std::vector<Tensor>& packed) {
  const char* op = "pack_network";
  int64_t size = 0;
  for (const Tensor& t : packed) size += t.numel();
  Tensor whole = empty_packed(divide_up(size, 4));
  char* to = static_cast<char*>(whole.mutable_data_ptr());
  for (const Tensor& t : packed) {
    to = std::copy_n(static_cast<const char*>(check_packed(op, t, t.numel())), t.numel(), to);
  }
  return whole;
}

std::vector<Tensor> network(const Tensor& x, const Tensor& packed, const std::string& units, const std::string& bounds,
                            bool) {
  const char* op = "network";
  const DType dtype = check_activation(op, x);
  const KernelTable& table = kernels();
  const Machine machine = this_machine();
  static PlanCache<NetworkKey, Network> networks(64);
  const NetworkKey key{size_of(x), {units, bounds}, dtype, machine.threads};
  const std::shared_ptr<const Network> known = networks.get(key, [&] {
    Network network{network_shape(op, x, key.arguments), {}};
    if (x.size(0) > 0) network.plan = plan_network(network.shape, dtype, machine);
    return network;
  });
  const NetworkShape& s = known->shape;
  const float* weights = check_packed_floats(op, packed, network_size(s, table.lanes));
  NetworkOutputs outputs = new_outputs(s, [&](const std::vector<int64_t>& sizes, bool channels_last) {
    return channels_last ? new_map(sizes, x.scalar_type()) : empty(sizes, x.scalar_type(), false);
  });
  run_network(table, machine, s, known->plan, dtype, images_of(x), weights, outputs.data.data(), parallel_for);
  return outputs.tensors;
}

int64_t cpu_threads() { return torch::stable::get_num_threads(); }

STABLE_TORCH_LIBRARY_IMPL(mnv2_fused, CPU, m) {
  m.impl("pack_block", TORCH_BOX(&pack_block_op));
  m.impl("inverted_residual", TORCH_BOX(&inverted_residual));
  m.impl("pack_dense", TORCH_BOX(&pack_dense_op));
  m.impl("dense", TORCH_BOX(&dense));
  m.impl("pack_head", TORCH_BOX(&pack_head_op));
  m.impl("head", TORCH_BOX(&head));
  m.impl("pack_network", TORCH_BOX(&pack_network));
  m.impl("network", TORCH_BOX(&network));
}

}  // namespace mnv2
