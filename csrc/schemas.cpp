// Every operator's schema but those of the cached_* operators, and nothing else. Kernels register themselves at their
// own end: csrc/cpu/infer.cpp, mnv2_fused/_core/registrations.py for the fake kernels, mnv2_fused/training for
// train_block and train_dense.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(mnv2_fused, m) {
  // dtype: of the activations that the packed weights are for; on the CPU they are for any. tf32: float32 may be
  // multiplied in tf32, on a GPU.
  m.def(
      "pack_block(Tensor? expand_weight, Tensor? expand_bias, Tensor depthwise_weight, Tensor depthwise_bias, "
      "Tensor project_weight, Tensor project_bias, ScalarType dtype) -> Tensor");
  // block, dense, head: the fields of csrc/shapes.h in their order. bounds: lo and hi of the activation.
  m.def("inverted_residual(Tensor x, Tensor packed, int[] block, float[] bounds, bool tf32=False) -> Tensor");
  m.def("pack_dense(Tensor weight, Tensor bias, ScalarType dtype) -> Tensor");
  m.def("dense(Tensor x, Tensor packed, int[] dense, float[] bounds, bool tf32=False) -> Tensor");
  m.def(
      "pack_head(Tensor conv_weight, Tensor conv_bias, Tensor classifier_weight, Tensor classifier_bias, "
      "ScalarType dtype) -> Tensor");
  m.def("head(Tensor x, Tensor packed, int[] head, float[] bounds, bool tf32=False) -> Tensor");
  m.def("pack_network(Tensor[] packed) -> Tensor");
  // blocks: the fields of one block after the other. bounds: those of the stem, each block, the head.
  m.def(
      "network(Tensor x, Tensor packed, int[] stem, int[] blocks, int[] head, float[] bounds, bool tf32=False) -> "
      "Tensor");

  // CUDA's name of the error with which the device refuses the kernels that were built; "" where it runs them.
  m.def("cuda_kernels_refused(int device) -> str");

  // A block in training; mnv2_fused/training. running: mean and variance of each batch norm with fixed statistics.
  // Besides y: what the backward needs. A norm is (6, c):
  // scale, shift, mean, unbiased variance, 1 / sqrt(var + eps), beta.
  // recompute: "most", "balanced" or "least". group: the process group of synchronised batch norms, or "". Unless keep,
  // no backward follows: z and hidden are empty.
  m.def(
      "train_block(Tensor x, Tensor? expand_weight, Tensor? expand_gamma, Tensor? expand_beta, "
      "Tensor depthwise_weight, Tensor? depthwise_gamma, Tensor? depthwise_beta, Tensor project_weight, "
      "Tensor? project_gamma, Tensor? project_beta, Tensor[] running, float[] eps, bool[] batch, int[] block, "
      "float[] bounds, str group, str recompute, bool keep) -> (Tensor y, Tensor z, Tensor hidden, Tensor mean, Tensor "
      "products, Tensor expand_norm, "
      "Tensor depthwise_norm, Tensor project_norm, Tensor counts)");
  m.def(
      "train_block_backward(Tensor dy, Tensor x, Tensor z, Tensor hidden, Tensor mean, Tensor products, "
      "Tensor expand_norm, Tensor depthwise_norm, Tensor project_norm, Tensor counts, "
      "Tensor? expand_weight, Tensor? expand_gamma, Tensor? expand_beta, Tensor depthwise_weight, "
      "Tensor? depthwise_gamma, Tensor? depthwise_beta, Tensor project_weight, Tensor? project_gamma, "
      "Tensor? project_beta, float[] eps, bool[] batch, int[] block, float[] bounds, "
      "str group, str recompute, bool[] needs) -> Tensor[]");
  // A dense convolution, batch norm and clamp in training.
  m.def(
      "train_dense(Tensor x, Tensor weight, Tensor? gamma, Tensor? beta, Tensor[] running, float eps, bool batch, "
      "int[] dense, float[] bounds, str group) -> "
      "(Tensor y, Tensor mean, Tensor products, Tensor norm, Tensor counts)");
  m.def(
      "train_dense_backward(Tensor dy, Tensor x, Tensor mean, Tensor products, Tensor norm, Tensor counts, "
      "Tensor weight, Tensor? gamma, Tensor? beta, float eps, bool batch, int[] dense, float[] bounds, "
      "str group, bool[] needs) -> Tensor[]");

  // The passes of training; mnv2_fused/training/passes.py says what each computes, csrc/cpu/kernels/table.h how. Maps
  // are fp32 and channels_last, vectors over channels float64. Tensors that were not asked for are empty.
  m.def("train_buffer(int size) -> Tensor");
  m.def("train_moments(Tensor x) -> (Tensor mean, Tensor products)");
  m.def("train_linear_moments(Tensor weight, Tensor mean, Tensor products) -> (Tensor mean, Tensor squares)");
  // Of a norm's row mean and sum of centred squares over `count` pixels; what its row is, see train_block.
  m.def("train_norm(Tensor? gamma, Tensor? beta, Tensor mean, Tensor squares, float count, float eps) -> Tensor");
  // (6, c): scale, shift and mean of the norm, and what makes the gradient of its input; see TrainTask. No sums: fixed
  // statistics.
  m.def("train_norm_backward(Tensor norm, Tensor? of_gradient, Tensor? of_product, float count) -> Tensor");
  m.def("train_map_moments(Tensor x) -> (Tensor mean, Tensor squares)");
  m.def("train_map_products(Tensor a, Tensor b, Tensor mean) -> (Tensor of_a, Tensor of_product)");
  m.def(
      "train_map_combine(Tensor a, Tensor scale, Tensor shift, Tensor? b=None, Tensor? b_scale=None, Tensor? c=None, "
      "Tensor(a!)? out=None) -> Tensor");
  // The closed form of a norm behind a linear map, products: gradient' x; mnv2_fused/training.
  m.def(
      "train_linear_gradients(Tensor norm, Tensor weight, Tensor products, Tensor of_beta, bool batch) -> "
      "(Tensor weight_gradient, Tensor of_gamma)");
  m.def(
      "train_linear_correction(Tensor(a!) weight_gradient, Tensor(b!)? input_gradient, Tensor norm, Tensor weight, "
      "Tensor of_gamma, Tensor of_beta, Tensor moments, float count, float share, Tensor? x, Tensor? residual) -> ()");
  m.def("train_windows(Tensor x, int[] dense, Tensor(a!) out) -> ()");
  // norms: scale and shift, the first of the rows (.., channels), behind each convolution. backward: the way back, see
  // pack_backward().
  m.def(
      "train_pack(Tensor? expand, Tensor? expand_norm, Tensor depthwise, Tensor? depthwise_norm, Tensor project, "
      "Tensor? project_norm, bool backward) -> Tensor");
  // hidden, gradient: wide maps, see TrainTask; flat. second: the second norm's scale, shift and mean, and in
  // train_hidden_backward the rows of train_norm_backward.
  m.def(
      "train_hidden(Tensor x, Tensor packed, int[] block, float[] bounds, Tensor(a!)? hidden) -> "
      "(Tensor mean, Tensor squares)");
  m.def("train_project(Tensor x, Tensor hidden, Tensor packed, Tensor second, int[] block, float[] bounds) -> Tensor");
  m.def(
      "train_project_backward(Tensor x, Tensor(a!)? hidden, bool made, Tensor(b!)? gradient, Tensor dz, "
      "Tensor packed, Tensor packed_backward, Tensor second, int[] block, float[] bounds, bool weight) -> "
      "(Tensor project_weight, Tensor of_gradient, Tensor of_product)");
  m.def(
      "train_hidden_backward(Tensor x, Tensor? hidden, Tensor? gradient, Tensor dz, Tensor packed, "
      "Tensor packed_backward, Tensor second, int[] block, float[] bounds, bool input, bool weight, "
      "bool with_projection, bool project_weight) -> (Tensor input, Tensor depthwise_weight, Tensor expand_weight, "
      "Tensor of_first, Tensor project_weight, Tensor of_gradient, Tensor of_product)");
  m.def(
      "train_linear_backward(Tensor x, Tensor gradient, Tensor packed, Tensor packed_backward, "
      "float[] bounds, bool input) -> (Tensor input, Tensor expand_weight, Tensor of_gradient)");
}
