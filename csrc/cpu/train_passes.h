// The passes of training in fp32 on the CPU, as the closed form in csrc/train/ calls them. Torch-free.
#pragma once

#include <memory>
#include <vector>

#include "../train/passes.h"
#include "passes.h"

namespace mnv2 {

// Maps and matrices of these passes are fp32.
inline const float* floats(train::ConstData data) { return static_cast<const float*>(data); }
inline float* floats(train::Data data) { return static_cast<float*>(data); }
// A map to read, for a task, which does not say whether it writes the map.
inline float* readable(train::ConstData data) { return const_cast<float*>(floats(data)); }

class CpuPasses final : public train::Passes {
 public:
  CpuPasses(const KernelTable& kernels, const Machine& machine, const ParallelFor& parallel)
      : parallel_(parallel), passes_{kernels, machine, parallel_} {}

  train::Data workspace(train::Slot slot, int64_t elements) override;
  double* vector(int64_t size) override;
  int64_t hidden_size(const BlockShape& s) const override;

  void moments(const train::Map& x, bool exact, double* mean, double* products) override;
  bool linear_moments(const train::Matrix& weight, const double* mean, const double* products, double least,
                      double* out_mean, double* out_squares) override;
  void linear_gradients(const train::Matrix& weight, const train::BatchNorm& norm, const train::LinearGradients& found,
                        bool batch, train::Data d_weight, double* d_gamma) override;
  void linear_correction(const train::Matrix& weight, const train::BatchNorm& norm, const double* d_gamma,
                         const double* d_beta, const double* products, double count, double share, train::Data d_weight,
                         const train::Map& x, train::ConstData residual, train::Data d_x) override;
  void scale_rows(int64_t rows, int64_t columns, const double* scale, train::Data matrix) override;
  void map_moments(const train::Map& x, double* mean, double* squares) override;
  void map_products(const train::Map& dy, train::ConstData x, const double* mean, const train::NormSums& sums) override;
  void map_combine(const train::Combination& c) override;
  void map_add(const train::Map& from, train::Data to) override;

  void set_block(const BlockShape& s, const train::BlockWeights& weights) override;
  void hidden(train::ConstData x, train::Data hidden, double* mean, double* squares) override;
  void project(train::ConstData x, train::ConstData hidden, const train::BatchNorm& depthwise,
               train::Data out) override;
  void set_backward(const double* project_scale) override;
  void project_backward(train::ConstData x, train::Data hidden, bool saved, train::Data d_hidden,
                        train::ConstData d_project, const train::BatchNorm& depthwise,
                        const train::ProjectGradients& found) override;
  void hidden_backward(train::ConstData x, train::ConstData hidden, train::ConstData d_hidden,
                       train::ConstData d_project, const train::BatchNorm& depthwise,
                       const train::BatchNormBackward& backward, const train::HiddenGradients& found) override;

  bool by_channels(const BlockShape& s) const override;
  int64_t expanded_size(const BlockShape& s) const override;
  void hidden_by_channels(train::ConstData x, const train::Conv& expand, const train::Conv& depthwise,
                          train::Data expanded, train::Data hidden, const train::BatchNorm& expand_norm,
                          const train::BatchNorm& depthwise_norm) override;
  void backward_by_channels(train::ConstData x, train::ConstData expanded, train::ConstData d_project,
                            const train::BatchNorm& expand_norm, const train::BatchNorm& depthwise_norm, bool deeper,
                            const train::ChannelGradients& found) override;
  void linear_by_channels(const BlockShape& s, train::ConstData x, train::ConstData weight, const train::Conv& conv,
                          const train::BatchNorm& norm, train::Data y) override;
  void linear_backward_by_channels(const BlockShape& s, train::ConstData x, train::ConstData dy,
                                   train::ConstData weight, const train::BatchNorm& norm,
                                   const train::ChannelGradients& found) override;

  void windows(const DenseShape& s, train::ConstData x, const int64_t strides[4], train::Data out) override;
  void add_windows(const DenseShape& s, train::ConstData windows, train::Data out) override;
  void window_matrix(const DenseShape& s, train::ConstData from, bool back, train::Data to) override;
  void dense(const DenseShape& s, train::ConstData x, const int64_t strides[4], train::ConstData weight,
             const double* scale, const double* shift, train::Data y) override;
  void linear_backward(const BlockShape& s, train::ConstData x, train::ConstData dy, train::ConstData weight,
                       const double* scale, const double* shift, const train::LinearGradients& found) override;

 private:
  class Channels;

  // A linear map as a block that ends at the expansion's clamp, for the passes over hidden channels.
  void set_linear(const BlockShape& s, train::ConstData weight, const double* scale, const double* shift);
  // A vector over channels in fp32, padded with zeros to whole chunks.
  const float* narrow(const double* from, int64_t channels);
  void set_norm(TrainTask& task, const train::BatchNorm& norm);
  TrainTask task_of(train::ConstData x) const;

  ParallelFor parallel_;
  mnv2::Passes passes_;
  std::vector<std::unique_ptr<double[]>> vectors_;
  BlockShape block_{};
  train::BlockWeights weights_{};
  const float *packed_ = nullptr, *packed_backward_ = nullptr;
};

}  // namespace mnv2
