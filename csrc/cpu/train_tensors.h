// What the operators of the training passes share: checks of maps and vectors, and the rows of a norm's backward.
#pragma once

#include <algorithm>
#include <tuple>
#include <vector>

#include "passes.h"
#include "tensors.h"

namespace mnv2 {

using Two = std::tuple<Tensor, Tensor>;

// Kernels, machine and threads for one call of an operator.
struct Context {
  ParallelFor parallel = parallel_for;
  Passes passes{kernels(), this_machine(), parallel};
};

inline Tensor doubles(const std::vector<int64_t>& sizes) { return empty(sizes, ScalarType::Double, false); }
inline Tensor floats(const std::vector<int64_t>& sizes) { return empty(sizes, ScalarType::Float, false); }

// A dense channels_last fp32 map (n, c, h, w). Sizes that are not negative must match.
inline const float* check_map(const char* op, const char* argument, const Tensor& t, int64_t n = -1, int64_t c = -1,
                              int64_t h = -1, int64_t w = -1) {
  MNV2_CHECK(t.is_cpu() && t.dim() == 4 && t.scalar_type() == ScalarType::Float, op, argument,
             " must be a float32 tensor (n, c, h, w) on the CPU, got ", describe(t));
  const int64_t sizes[] = {n, c, h, w};
  for (int64_t d = 0; d < 4; ++d) {
    MNV2_CHECK(sizes[d] < 0 || t.size(d) == sizes[d], op, argument, " must have size ", sizes[d], " along dimension ",
               d, ", got ", describe(t));
  }
  check_channels_last(op, t);
  check_memory(op, argument, t);
  return t.const_data_ptr<float>();
}

inline const double* check_doubles(const char* op, const char* argument, const Tensor& t,
                                   const std::vector<int64_t>& sizes) {
  bool same = t.dim() == static_cast<int64_t>(sizes.size());
  for (size_t d = 0; same && d < sizes.size(); ++d) same = t.size(static_cast<int64_t>(d)) == sizes[d];
  MNV2_CHECK(same && t.is_cpu() && t.is_contiguous() && t.scalar_type() == ScalarType::Double, op, argument,
             " must be a contiguous float64 tensor on the CPU of the channels' size, got ", describe(t));
  check_memory(op, argument, t);
  return t.const_data_ptr<double>();
}

// Float64 vectors over channels, (rows, channels) or (channels), as fp32, each padded with zeros to whole chunks.
class FloatRows {
 public:
  FloatRows(const char* op, const char* argument, const Tensor& t, const std::vector<int64_t>& sizes)
      : channels_(sizes.back()), row_(round_up(channels_, kChunk)) {
    const double* from = check_doubles(op, argument, t, sizes);
    const int64_t rows = channels_ ? t.numel() / channels_ : 0;
    data_.resize(static_cast<size_t>(rows * row_));
    for (int64_t i = 0; i < rows; ++i)
      std::copy_n(from + i * channels_, channels_, &data_[static_cast<size_t>(i * row_)]);
  }
  const float* row(int64_t i) const { return &data_[static_cast<size_t>(i * row_)]; }

 private:
  int64_t channels_, row_;
  std::vector<float> data_;
};

inline int64_t pixels_of(const Tensor& x) { return x.size(0) * x.size(2) * x.size(3); }

// Rows of train_norm_backward: those of the norm that its backward reads, and the factors of
// d_input = d_output_factor * d_output + input_factor * input + constant.
enum BatchNormBackward { kScale, kShift, kMean, kDOutput, kInput, kConstant, kBackwardRows };

}  // namespace mnv2
