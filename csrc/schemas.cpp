// Every operator's schema. Kernels are registered elsewhere: in csrc/cpu/ and csrc/cuda/infer.cpp; fake kernels, and
// the cached_* operators on CUDA, in mnv2_fused/_core/registrations.py; train_block and train_dense in
// mnv2_fused/training.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(mnv2_fused, m) {
  // dtype: on a GPU, the dtype of the activations that the packed weights are for; on the CPU they serve any dtype.
  // tf32: on a GPU, float32 may be multiplied in tf32.
  m.def(
      "pack_block(Tensor? expand_weight, Tensor? expand_bias, Tensor depthwise_weight, Tensor depthwise_bias, "
      "Tensor project_weight, Tensor project_bias, ScalarType dtype) -> Tensor");
  // block, dense, head: the fields of csrc/shapes.h, in their order. bounds: lo and hi of the activation, for a block
  // also of its output.
  m.def("inverted_residual(Tensor x, Tensor packed, int[] block, float[] bounds, bool tf32=False) -> Tensor");
  m.def("pack_dense(Tensor weight, Tensor bias, ScalarType dtype) -> Tensor");
  // image_bias: (n, c_out), float32; replaces the packed bias.
  m.def(
      "dense(Tensor x, Tensor packed, int[] dense, float[] bounds, bool tf32=False, Tensor? image_bias=None) -> "
      "Tensor");
  m.def(
      "pack_head(Tensor conv_weight, Tensor conv_bias, Tensor classifier_weight, Tensor classifier_bias, "
      "ScalarType dtype) -> Tensor");
  m.def("head(Tensor x, Tensor packed, int[] head, float[] bounds, bool tf32=False) -> Tensor");
  m.def("pack_network(Tensor[] packed) -> Tensor");
  // units, bounds: see NetworkArguments in csrc/network.h. Returns the outputs of the tapped units, in their order.
  m.def("network(Tensor x, Tensor packed, int[] units, float[] bounds, bool tf32=False) -> Tensor[]");

  // The operators of traced graphs. tensors: parameters and buffers, six for each convolution, and eps: as flat() of a
  // spec gives them (mnv2_fused/_core/specs.py). cache: names the packed weights of earlier calls.
  m.def(
      "cached_inverted_residual(Tensor x, Tensor?[] tensors, str cache, float[] eps, int[] block, float[] bounds) -> "
      "Tensor");
  m.def("cached_dense(Tensor x, Tensor?[] tensors, str cache, float[] eps, int[] dense, float[] bounds) -> Tensor");
  m.def("cached_head(Tensor x, Tensor?[] tensors, str cache, float[] eps, int[] head, float[] bounds) -> Tensor");
  m.def("cached_network(Tensor x, Tensor?[] tensors, str cache, float[] eps, int[] units, float[] bounds) -> Tensor[]");
  // The same with gradients, which Python adds: they make a call without gradients slower, too.
  m.def(
      "cached_inverted_residual_grad(Tensor x, Tensor?[] tensors, str cache, float[] eps, int[] block, "
      "float[] bounds) -> Tensor");
  m.def(
      "cached_dense_grad(Tensor x, Tensor?[] tensors, str cache, float[] eps, int[] dense, float[] bounds) -> Tensor");
  m.def("cached_head_grad(Tensor x, Tensor?[] tensors, str cache, float[] eps, int[] head, float[] bounds) -> Tensor");
  m.def(
      "cached_network_grad(Tensor x, Tensor?[] tensors, str cache, float[] eps, int[] units, float[] bounds) -> "
      "Tensor[]");

  // CUDA's name of the error with which the device refuses the kernels of this build; "" if it runs them.
  m.def("cuda_kernels_refused(int device) -> str");

  // A block in training; see mnv2_fused/training and docs/training.md. Vectors over channels are float64.
  //
  // running: mean and variance of each batch norm with fixed statistics. batch: whether each norm uses the batch's.
  // group: the process group of synchronised batch norms, or "". recompute: "most", "balanced" or "least". Unless
  // `save`, no backward follows, and projected and hidden are empty.
  //
  // Behind y, what the backward needs: the projection's output, the depthwise outputs (see TrainTask) or nothing, mean
  // and centred products of x, the norms, the numbers of pixels behind expand_norm and behind the others. A norm is
  // (6, c): scale, shift, mean, unbiased variance, rstd = 1 / sqrt(var + eps), beta.
  m.def(
      "train_block(Tensor x, Tensor? expand_weight, Tensor? expand_gamma, Tensor? expand_beta, "
      "Tensor depthwise_weight, Tensor? depthwise_gamma, Tensor? depthwise_beta, Tensor project_weight, "
      "Tensor? project_gamma, Tensor? project_beta, Tensor[] running, float[] eps, bool[] batch, int[] block, "
      "float[] bounds, str group, str recompute, bool save) -> "
      "(Tensor y, Tensor projected, Tensor hidden, Tensor mean, Tensor products, Tensor expand_norm, "
      "Tensor depthwise_norm, Tensor project_norm, Tensor counts)");
  // Gradients of x and of the parameters that are given. Those that no one needs are empty.
  m.def(
      "train_block_backward(Tensor dy, Tensor x, Tensor projected, Tensor hidden, Tensor mean, Tensor products, "
      "Tensor expand_norm, Tensor depthwise_norm, Tensor project_norm, Tensor counts, "
      "Tensor? expand_weight, Tensor? expand_gamma, Tensor? expand_beta, Tensor depthwise_weight, "
      "Tensor? depthwise_gamma, Tensor? depthwise_beta, Tensor project_weight, Tensor? project_gamma, "
      "Tensor? project_beta, float[] eps, bool[] batch, int[] block, float[] bounds, "
      "str group, str recompute, bool[] needs) -> Tensor[]");
  // A dense convolution, batch norm and clamp in training. mean, products: of its windows.
  m.def(
      "train_dense(Tensor x, Tensor weight, Tensor? gamma, Tensor? beta, Tensor[] running, float eps, bool batch, "
      "int[] dense, float[] bounds, str group) -> "
      "(Tensor y, Tensor mean, Tensor products, Tensor norm, Tensor counts)");
  m.def(
      "train_dense_backward(Tensor dy, Tensor x, Tensor mean, Tensor products, Tensor norm, Tensor counts, "
      "Tensor weight, Tensor? gamma, Tensor? beta, float eps, bool batch, int[] dense, float[] bounds, "
      "str group, bool[] needs) -> Tensor[]");

  // The passes of training; mnv2_fused/training/passes.py says what each computes, csrc/cpu/kernels/tasks.h how. Maps
  // are fp32 and channels_last. Outputs that were not asked for are empty.
  m.def("train_buffer(int size) -> Tensor");
  m.def("train_moments(Tensor x, bool exact) -> (Tensor mean, Tensor products)");
  m.def(
      "train_linear_moments(Tensor weight, Tensor mean, Tensor products, float least) -> "
      "(Tensor mean, Tensor squares, bool cancels)");
  // The norm (see train_block) of an input with this mean and sum of centred squares over `count` pixels.
  m.def("train_norm(Tensor? gamma, Tensor? beta, Tensor mean, Tensor squares, float count, float eps) -> Tensor");
  // (6, c): the norm's scale, shift and mean, then a, b and c of d_input = a * d_output + b * input + c. Without sums:
  // for fixed statistics.
  m.def("train_norm_backward(Tensor norm, Tensor? sum_dy, Tensor? sum_dy_centred, float count) -> Tensor");
  m.def("train_map_moments(Tensor x) -> (Tensor mean, Tensor squares)");
  m.def("train_map_products(Tensor dy, Tensor x, Tensor mean) -> (Tensor sum_dy, Tensor sum_dy_centred)");
  m.def(
      "train_map_combine(Tensor a, Tensor scale, Tensor shift, Tensor? b=None, Tensor? b_scale=None, Tensor? c=None, "
      "Tensor(a!)? out=None) -> Tensor");
  // The closed form of a norm behind a linear map. d_folded: gradient of the folded weight.
  m.def(
      "train_linear_gradients(Tensor norm, Tensor weight, Tensor d_folded, Tensor sum_dy, Tensor sum_dy_linear, "
      "bool batch) -> "
      "(Tensor d_weight, Tensor d_gamma)");
  m.def(
      "train_linear_correction(Tensor(a!) d_weight, Tensor(b!)? d_x, Tensor norm, Tensor weight, Tensor d_gamma, "
      "Tensor d_beta, Tensor products, float count, float share, Tensor? x, Tensor? residual) -> ()");
  m.def("train_windows(Tensor x, int[] dense, Tensor(a!) out) -> ()");
  // expand_norm, depthwise_norm, project_norm: rows that begin with scale and shift. backward: packs the
  // weights of the backward, see pack_backward().
  m.def(
      "train_pack(Tensor? expand, Tensor? expand_norm, Tensor depthwise, Tensor? depthwise_norm, Tensor project, "
      "Tensor? project_norm, bool backward) -> Tensor");
  // hidden, d_hidden: wide maps, flat; see TrainTask. depthwise_norm: rows that begin with scale, shift and mean.
  // norm_backward: the rows of train_norm_backward.
  m.def(
      "train_hidden(Tensor x, Tensor packed, int[] block, float[] bounds, Tensor(a!)? hidden) -> "
      "(Tensor mean, Tensor squares)");
  m.def(
      "train_project(Tensor x, Tensor hidden, Tensor packed, Tensor depthwise_norm, int[] block, float[] bounds) -> "
      "Tensor");
  // hidden_saved: `hidden` is read; else it is written.
  m.def(
      "train_project_backward(Tensor x, Tensor(a!)? hidden, bool hidden_saved, Tensor(b!)? d_hidden, "
      "Tensor d_project, Tensor packed, Tensor packed_backward, Tensor depthwise_norm, int[] block, float[] bounds, "
      "bool wants_project) -> (Tensor d_project_weight, Tensor sum_dy, Tensor sum_dy_centred)");
  // with_projection: computes d_hidden and the outputs of train_project_backward in the same pass.
  m.def(
      "train_hidden_backward(Tensor x, Tensor? hidden, Tensor? d_hidden, Tensor d_project, Tensor packed, "
      "Tensor packed_backward, Tensor norm_backward, int[] block, float[] bounds, bool wants_x, bool wants_expand, "
      "bool with_projection, bool wants_project) -> (Tensor d_x, Tensor d_depthwise_weight, Tensor d_expand_weight, "
      "Tensor sum_d_expand, Tensor sum_d_expand_linear, Tensor d_project_weight, Tensor sum_dy, "
      "Tensor sum_dy_centred)");
  m.def(
      "train_linear_backward(Tensor x, Tensor dy, Tensor packed, Tensor packed_backward, float[] bounds, "
      "bool wants_x) -> (Tensor d_x, Tensor d_folded, Tensor sum_dy, Tensor sum_dy_linear)");
}
