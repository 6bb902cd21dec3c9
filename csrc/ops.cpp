// Every operator's schema, and nothing else. Kernels register themselves at their own end: csrc/cpu/infer.cpp, and
// mnv2_fused/_registrations.py for the cached_* operators and the fake kernels.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(mnv2_fused, m) {
  m.def(
      "pack_block(Tensor? expand_weight, Tensor? expand_bias, Tensor depthwise_weight, Tensor depthwise_bias, "
      "Tensor project_weight, Tensor project_bias) -> Tensor");
  m.def(
      "inverted_residual(Tensor x, Tensor packed, int c_hidden, int c_out, int kernel, int stride, int dilation, "
      "int[] padding, bool has_expand, bool residual, float lo, float hi) -> Tensor");
  m.def("pack_stem(Tensor weight, Tensor bias) -> Tensor");
  m.def(
      "stem(Tensor x, Tensor packed, int c_out, int kernel, int stride, int[] padding, float lo, float hi) -> Tensor");
  m.def("pack_head(Tensor conv_weight, Tensor conv_bias, Tensor classifier_weight, Tensor classifier_bias) -> Tensor");
  m.def("head(Tensor x, Tensor packed, int c_last, int num_classes, float lo, float hi) -> Tensor");
  m.def("pack_network(Tensor[] packed) -> Tensor");
  // stem: c_out, kernel, stride, padding (4). blocks, for each: c_hidden, c_out, kernel, stride, dilation, padding (4),
  // has_expand, residual. head: c_last, num_classes. bounds: lo, hi of the stem, each block, the head. Paddings of -1
  // are TensorFlow's "SAME", from the map's size.
  m.def("network(Tensor x, Tensor packed, int[] stem, int[] blocks, int[] head, float[] bounds) -> Tensor");

  // On weights that are folded and packed on first use and kept until they change; `cache` names where.
  m.def(
      "cached_inverted_residual(Tensor x, Tensor?[] parameters, str cache, float[] eps, int kernel, int stride, "
      "int dilation, int[] padding, bool has_expand, bool residual, float lo, float hi) -> Tensor");
  m.def(
      "cached_stem(Tensor x, Tensor?[] parameters, str cache, float[] eps, int kernel, int stride, int[] padding, "
      "float lo, float hi) -> Tensor");
  m.def("cached_head(Tensor x, Tensor?[] parameters, str cache, float[] eps, float lo, float hi) -> Tensor");
  m.def(
      "cached_network(Tensor x, Tensor?[] parameters, str cache, float[] eps, int[] stem, int[] blocks, int[] head, "
      "float[] bounds) -> Tensor");
}
