// The inference operators on the CPU: tensors to pointers, checks, threads.
#include "pack.h"
#include "run.h"
#include "torch.h"

namespace mnv2 {
namespace {

Images images_of(const Tensor& x) { return {x.const_data_ptr(), {x.stride(0), x.stride(1), x.stride(2), x.stride(3)}}; }

// Memory for packed weights. Where they are large they lie in huge pages: a network's weights are read once an image,
// more pages than the processor has translations for.
Tensor empty_packed(int64_t size) {
#ifdef MADV_HUGEPAGE
  constexpr int64_t kHuge = int64_t{2} << 20, kFloats = kHuge / 4;
  if (size >= kFloats / 2) {
    Tensor whole = empty({round_up(size, kFloats) + kFloats}, ScalarType::Float, false);
    float* data = whole.mutable_data_ptr<float>();
    const int64_t skip = (kHuge - reinterpret_cast<intptr_t>(data) % kHuge) % kHuge / 4;
    advise_huge_pages(data + skip, round_up(size, kFloats) * 4);
    return torch::stable::narrow(whole, 0, skip, size);
  }
#endif
  return empty({size}, ScalarType::Float, false);
}

Tensor pack_block_op(const OptionalTensor& expand_weight, const OptionalTensor& expand_bias,
                     const Tensor& depthwise_weight, const Tensor& depthwise_bias, const Tensor& project_weight,
                     const Tensor& project_bias, ScalarType) {
  const char* op = "pack_block";
  MNV2_CHECK(depthwise_weight.dim() == 4 && project_weight.dim() == 4, op,
             "depthwise_weight and project_weight must have 4 dimensions, got ", describe(depthwise_weight), " and ",
             describe(project_weight));
  MNV2_CHECK(expand_weight.has_value() == expand_bias.has_value(), op,
             "expand_weight and expand_bias must be given together");
  const int64_t c_hidden = depthwise_weight.size(0), kernel = depthwise_weight.size(2), c_out = project_weight.size(0);
  MNV2_CHECK(!expand_weight || expand_weight->dim() == 4, op, "expand_weight must have 4 dimensions");
  const int64_t c_in = expand_weight ? expand_weight->size(1) : c_hidden;
  check_shape(op, BlockShape{0, kernel, kernel, c_in, c_hidden, c_out, kernel, 1, 1, 0, 0, 0, 0,
                             expand_weight.has_value(), false, 0.f, 0.f});
  BlockWeights w{};
  std::vector<double> shifts[3];
  const auto shift = [&](int i, const char* argument, const Tensor& bias, int64_t channels) {
    const float* values = check_weight(op, argument, bias, {channels});
    shifts[i].assign(values, values + channels);
    return BlockWeights::Norm{nullptr, shifts[i].data()};
  };
  if (expand_weight) {
    w.expand = check_weight(op, "expand_weight", *expand_weight, {c_hidden, c_in, 1, 1});
    w.expand_norm = shift(0, "expand_bias", *expand_bias, c_hidden);
  }
  w.depthwise = check_weight(op, "depthwise_weight", depthwise_weight, {c_hidden, 1, kernel, kernel});
  w.depthwise_norm = shift(1, "depthwise_bias", depthwise_bias, c_hidden);
  w.project = check_weight(op, "project_weight", project_weight, {c_out, c_hidden, 1, 1});
  w.project_norm = shift(2, "project_bias", project_bias, c_out);
  const Lanes lanes = kernels().lanes;
  Tensor packed = empty_packed(block_layout(c_in, c_hidden, c_out, kernel, w.expand != nullptr, lanes).size);
  pack_block(c_in, c_hidden, c_out, kernel, w, lanes, parallel_for, packed.mutable_data_ptr<float>());
  return packed;
}

Tensor inverted_residual(const Tensor& x, const Tensor& packed, int64_t c_hidden, int64_t c_out, int64_t kernel,
                         int64_t stride, int64_t dilation, const std::vector<int64_t>& padding, bool has_expand,
                         bool residual, double lo, double hi, bool) {
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
  const KernelTable& table = kernels();
  const float* weights =
      check_packed(op, packed, block_layout(s.c_in, c_hidden, c_out, kernel, has_expand, table.lanes).size);
  Tensor y = new_map({s.n, c_out, h_out(s), w_out(s)}, x.scalar_type());
  run_block(table, this_machine(), s, dtype, x.const_data_ptr(), weights, y.mutable_data_ptr(), parallel_for);
  return y;
}

Tensor pack_stem_op(const Tensor& weight, const Tensor& bias, ScalarType) {
  const char* op = "pack_stem";
  MNV2_CHECK(weight.dim() == 4, op, "weight must have 4 dimensions, got ", describe(weight));
  const int64_t c_out = weight.size(0), c_in = weight.size(1), kernel = weight.size(2);
  check_shape(op, StemShape{0, kernel, kernel, c_in, c_out, kernel, 1, 0, 0, 0, 0, 0.f, 0.f});
  const float* w = check_weight(op, "weight", weight, {c_out, c_in, kernel, kernel});
  const float* b = check_weight(op, "bias", bias, {c_out});
  const Lanes lanes = kernels().lanes;
  Tensor packed = empty_packed(stem_size(c_in, c_out, kernel, lanes));
  pack_stem(c_in, c_out, kernel, w, b, lanes, packed.mutable_data_ptr<float>());
  return packed;
}

Tensor stem(const Tensor& x, const Tensor& packed, int64_t c_out, int64_t kernel, int64_t stride,
            const std::vector<int64_t>& padding, double lo, double hi, bool) {
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
  const KernelTable& table = kernels();
  const float* weights = check_packed(op, packed, stem_size(s.c_in, c_out, kernel, table.lanes));
  Tensor y = new_map({s.n, c_out, h_out(s), w_out(s)}, x.scalar_type());
  run_stem(table, this_machine(), s, dtype, images_of(x), weights, y.mutable_data_ptr(), parallel_for);
  return y;
}

Tensor pack_head_op(const Tensor& conv_weight, const Tensor& conv_bias, const Tensor& classifier_weight,
                    const Tensor& classifier_bias, ScalarType) {
  const char* op = "pack_head";
  MNV2_CHECK(conv_weight.dim() == 4 && classifier_weight.dim() == 2, op,
             "conv_weight must have 4 dimensions and classifier_weight 2, got ", describe(conv_weight), " and ",
             describe(classifier_weight));
  const int64_t c_last = conv_weight.size(0), c_in = conv_weight.size(1), classes = classifier_weight.size(0);
  check_shape(op, HeadShape{0, 1, 1, c_in, c_last, classes, 0.f, 0.f});
  const float* conv = check_weight(op, "conv_weight", conv_weight, {c_last, c_in, 1, 1});
  const float* conv_b = check_weight(op, "conv_bias", conv_bias, {c_last});
  const float* classifier = check_weight(op, "classifier_weight", classifier_weight, {classes, c_last});
  const float* classifier_b = check_weight(op, "classifier_bias", classifier_bias, {classes});
  const Lanes lanes = kernels().lanes;
  Tensor packed = empty_packed(head_size(c_in, c_last, classes, lanes));
  pack_head(c_in, c_last, classes, conv, conv_b, classifier, classifier_b, lanes, packed.mutable_data_ptr<float>());
  return packed;
}

Tensor head(const Tensor& x, const Tensor& packed, int64_t c_last, int64_t num_classes, double lo, double hi, bool) {
  const char* op = "head";
  const DType dtype = check_activation(op, x);
  const HeadShape s{
      x.size(0), x.size(2), x.size(3), x.size(1), c_last, num_classes, static_cast<float>(lo), static_cast<float>(hi)};
  check_shape(op, s);
  check_channels_last(op, x);
  const KernelTable& table = kernels();
  const float* weights = check_packed(op, packed, head_size(s.c_in, c_last, num_classes, table.lanes));
  Tensor y = empty({s.n, num_classes}, x.scalar_type(), false);
  run_head(table, this_machine(), s, dtype, x.const_data_ptr(), weights, y.mutable_data_ptr(), parallel_for);
  return y;
}

Tensor pack_network(const std::vector<Tensor>& packed) {
  const char* op = "pack_network";
  int64_t size = 0;
  for (const Tensor& t : packed) size += t.numel();
  Tensor whole = empty_packed(size);
  float* to = whole.mutable_data_ptr<float>();
  for (const Tensor& t : packed) to = std::copy_n(check_packed(op, t, t.numel()), t.numel(), to);
  return whole;
}

Tensor network(const Tensor& x, const Tensor& packed, const std::vector<int64_t>& stem,
               const std::vector<int64_t>& blocks, const std::vector<int64_t>& head, const std::vector<double>& bounds,
               bool) {
  const char* op = "network";
  const DType dtype = check_activation(op, x);
  std::string rule;
  const NetworkShape s = network_shape(x.size(0), x.size(2), x.size(3), x.size(1), {stem, blocks, head, bounds}, &rule);
  MNV2_CHECK(rule.empty(), op, rule);
  const KernelTable& table = kernels();
  const float* weights = check_packed(op, packed, network_size(s, table.lanes));
  Tensor y = empty({s.stem.n, s.head.classes}, x.scalar_type(), false);
  run_network(table, this_machine(), s, dtype, images_of(x), weights, y.mutable_data_ptr(), parallel_for);
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mnv2_fused, CPU, m) {
  m.impl("pack_block", TORCH_BOX(&pack_block_op));
  m.impl("inverted_residual", TORCH_BOX(&inverted_residual));
  m.impl("pack_stem", TORCH_BOX(&pack_stem_op));
  m.impl("stem", TORCH_BOX(&stem));
  m.impl("pack_head", TORCH_BOX(&pack_head_op));
  m.impl("head", TORCH_BOX(&head));
  m.impl("pack_network", TORCH_BOX(&pack_network));
  m.impl("network", TORCH_BOX(&network));
}

}  // namespace mnv2
