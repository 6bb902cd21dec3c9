// Every operator's schema. Kernels are registered elsewhere: in csrc/cpu/ and csrc/cuda/infer.cpp; fake kernels, and
// the cached_* operators on CUDA, and frozen_network, in mnv2_fused/_core/registrations.py; sum_over_processes in
// mnv2_fused/training/processes.py.
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
  // The same on a GPU with a plan that is not the quickest: tile is cuda::ChosenTile. For tests and measurements.
  m.def(
      "inverted_residual_planned(Tensor x, Tensor packed, int[] block, float[] bounds, bool tf32, int[] tile) -> "
      "Tensor");
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
  m.def("network(Tensor x, Tensor packed, str units, str bounds, bool tf32=False) -> Tensor[]");

  // The operators of traced graphs. tensors: parameters and buffers, six for each convolution, and eps: as flat() of a
  // spec gives them (mnv2_fused/_core/specs.py). cache: names the packed weights of earlier calls.
  m.def(
      "cached_inverted_residual(Tensor x, Tensor?[] tensors, str cache, float[] eps, int[] block, float[] bounds) -> "
      "Tensor");
  m.def("cached_dense(Tensor x, Tensor?[] tensors, str cache, float[] eps, int[] dense, float[] bounds) -> Tensor");
  m.def("cached_head(Tensor x, Tensor?[] tensors, str cache, float[] eps, int[] head, float[] bounds) -> Tensor");
  m.def("cached_network(Tensor x, Tensor?[] tensors, str cache, float[] eps, str units, str bounds) -> Tensor[]");
  // The same with gradients, which Python adds: they make a call without gradients slower, too.
  m.def(
      "cached_inverted_residual_grad(Tensor x, Tensor?[] tensors, str cache, float[] eps, int[] block, "
      "float[] bounds) -> Tensor");
  m.def(
      "cached_dense_grad(Tensor x, Tensor?[] tensors, str cache, float[] eps, int[] dense, float[] bounds) -> Tensor");
  m.def("cached_head_grad(Tensor x, Tensor?[] tensors, str cache, float[] eps, int[] head, float[] bounds) -> Tensor");
  m.def("cached_network_grad(Tensor x, Tensor?[] tensors, str cache, float[] eps, str units, str bounds) -> Tensor[]");
  // A frozen network in a graph of torch.compile: runs the module that has this cache. The outputs' sizes follow from
  // units, those at tracing.
  m.def("frozen_network(Tensor x, str cache, str units) -> Tensor[]");

  // CUDA's name of the error with which the device refuses the kernels of this build; "" if it runs them.
  m.def("cuda_kernels_refused(int device) -> str");

  // A block in training; see docs/training.md and csrc/train/.
  //
  // running: mean and variance of each batch norm with fixed statistics. batch: whether each norm uses the batch's.
  // group: the process group of synchronised batch norms, or "". recompute: "most", "balanced" or "least". Unless
  // `save`, no backward follows, and projected and wide are empty.
  //
  // Behind y, what the backward needs: the projection's output, a wide map or nothing (see Block::saves_wide() in
  // csrc/train/block.h), and `state`, float64 numbers (see BlockState there). Then mean and unbiased variance of each
  // norm; empty unless it uses the batch's.
  m.def(
      "train_block(Tensor x, Tensor? expand_weight, Tensor? expand_gamma, Tensor? expand_beta, "
      "Tensor depthwise_weight, Tensor? depthwise_gamma, Tensor? depthwise_beta, Tensor project_weight, "
      "Tensor? project_gamma, Tensor? project_beta, Tensor[] running, float[] eps, bool[] batch, int[] block, "
      "float[] bounds, str group, str recompute, bool save) -> "
      "(Tensor y, Tensor projected, Tensor wide, Tensor state, Tensor expand_mean, Tensor expand_var, "
      "Tensor depthwise_mean, Tensor depthwise_var, Tensor project_mean, Tensor project_var)");
  // Gradients of x and of the parameters that are given. Those that no one needs are empty.
  m.def(
      "train_block_backward(Tensor dy, Tensor x, Tensor projected, Tensor wide, Tensor state, "
      "Tensor? expand_weight, Tensor? expand_gamma, Tensor? expand_beta, Tensor depthwise_weight, "
      "Tensor? depthwise_gamma, Tensor? depthwise_beta, Tensor project_weight, Tensor? project_gamma, "
      "Tensor? project_beta, float[] eps, bool[] batch, int[] block, float[] bounds, "
      "str group, str recompute, bool[] needs) -> Tensor[]");
  // A dense convolution, batch norm and clamp in training.
  m.def(
      "train_dense(Tensor x, Tensor weight, Tensor? gamma, Tensor? beta, Tensor[] running, float eps, bool batch, "
      "int[] dense, float[] bounds, str group) -> (Tensor y, Tensor state, Tensor mean, Tensor var)");
  m.def(
      "train_dense_backward(Tensor dy, Tensor x, Tensor state, Tensor weight, Tensor? gamma, Tensor? beta, "
      "float eps, bool batch, int[] dense, float[] bounds, str group, bool[] needs) -> Tensor[]");
  // Sums a float64 vector over the processes of a group. In Python, where process groups are known by name.
  m.def("sum_over_processes(Tensor(a!) sums, str group) -> ()");
}
