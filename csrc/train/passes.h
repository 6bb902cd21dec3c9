// What the closed form of training is made of: passes over pixels, and small work on vectors over channels. A backend
// implements the interface; block.cpp, dense.cpp and linear.cpp put the passes together and know nothing else of it.
// Torch-free.
//
// Memory belongs to the backend: its elements have the backend's type, it may lie on another device, and only the
// backend reads it. Maps are dense in the order n, h, w, c. Vectors over channels and sums over pixels are float64.
#pragma once

#include <cstdint>

#include "../api.h"
#include "../shapes.h"
#include "batch_norm.h"

namespace mnv2::train {

using Data = void*;
using ConstData = const void*;

struct Map {
  ConstData data;
  int64_t pixels, channels;
};

// The weights of a linear map, (rows, columns).
struct Matrix {
  ConstData data;
  int64_t rows, columns;
};

// A convolution and the batch norm behind it.
struct Conv {
  ConstData weight;            // dense, in PyTorch's order
  const double *gamma, *beta;  // null: 1, 0
  double eps;
  bool batch;  // the batch's statistics, not these fixed ones:
  const double *mean, *var;
};

// The weights of a block. A norm of the expansion is folded in.
struct BlockWeights {
  ConstData expand, depthwise, project;  // expand: null if there is none
  const double *expand_scale, *expand_shift;
};

// Parts of a thread's workspace. All units share it, because faulting in fresh pages costs more time than the kernels
// that write them. What lies in one holds until its next use.
enum class Slot { kHidden, kDHidden, kDProject, kCentred, kGradient, kMatrix, kCount };

// out = scale * a + shift (+ b_scale * b) (+ c), by channel. `out` may be `a`.
struct Combination {
  Map a;
  const double *scale, *shift;
  ConstData b;  // or null
  const double* b_scale;
  ConstData c;  // or null
  Data out;
};

// Sums over pixels of dy, and of dy * (x - mean): (channels) each.
struct NormSums {
  double *dy, *dy_centred;
};

// The backward of a projection, and of the activation and norm before it. sums.dy is of d_hidden, the gradient of that
// norm's output.
struct ProjectGradients {
  Data d_weight;  // (c_out, c_hidden): d_project' (activated hidden); null if not wanted
  NormSums sums;  // (c_hidden)
};

// The backward of a linear map behind which a norm is folded in. dy is the gradient of the norm's output.
struct LinearGradients {
  Data d_x;               // through the folded weights alone; null if not wanted
  Data d_folded;          // (rows, columns), gradient of the folded weights: sum of dy x'; null if not wanted
  double* sum_dy;         // (rows)
  double* sum_dy_linear;  // (rows): of dy * (folded weights x); 0 without an expansion
};

// The backward of a block's depthwise convolution and expansion.
struct HiddenGradients {
  Data d_depthwise;  // (c_hidden, kernel * kernel)
  LinearGradients expand;
  bool with_project;  // computes, in the same pass:
  ProjectGradients project;
};

// The backward channel by channel; null: not wanted, or no part of the pass.
struct ChannelGradients {
  ProjectGradients project;
  Data d_depthwise;
  Data d_expand;    // (c_hidden, c_in)
  NormSums expand;  // of the gradient of the expansion's norm's output
  Data d_x;
  ConstData residual;  // added to d_x
};

class MNV2_FUSED_API Passes {
 public:
  Passes() = default;
  Passes(const Passes&) = delete;
  Passes& operator=(const Passes&) = delete;
  virtual ~Passes() = default;

  // ------------------------------------------------------------------------------------------------------- memory

  virtual Data workspace(Slot slot, int64_t elements) = 0;
  // A vector, until the passes' end.
  virtual double* vector(int64_t size) = 0;
  // Elements of a hidden map, in the backend's layout.
  virtual int64_t hidden_size(const BlockShape& s) const = 0;

  // ------------------------------------------------------------------------------------------ maps and linear maps

  // Mean of the channels, and sum of products of the centred channels (channels, channels). exact: sums float64
  // products.
  virtual void moments(const Map& x, bool exact, double* mean, double* products) = 0;
  // Mean and sum of centred squares (rows) of `weight` times an input with these moments. Returns whether so much
  // cancels in some sum that products must be exact. `least` is what is added to the sums later.
  virtual bool linear_moments(const Matrix& weight, const double* mean, const double* products, double least,
                              double* out_mean, double* out_squares) = 0;
  // Gradients of weight and gamma of a linear map with batch norm. If the statistics are the batch's, x was centred in
  // `found`, and d_weight still lacks linear_correction().
  virtual void linear_gradients(const Matrix& weight, const BatchNorm& norm, const LinearGradients& found, bool batch,
                                Data d_weight, double* d_gamma) = 0;
  // Adds the terms of the batch's statistics to d_weight and to d_x, which may be null. x is the centred input,
  // `products` the sum of products of x over all `count` pixels, of which this process has `share`. d_gamma, d_beta:
  // over all pixels. residual: added to d_x; or null.
  virtual void linear_correction(const Matrix& weight, const BatchNorm& norm, const double* d_gamma,
                                 const double* d_beta, const double* products, double count, double share,
                                 Data d_weight, const Map& x, ConstData residual, Data d_x) = 0;
  // Multiplies each row of a matrix, in place.
  virtual void scale_rows(int64_t rows, int64_t columns, const double* scale, Data matrix) = 0;
  // Mean, and sum of squares of the centred channels.
  virtual void map_moments(const Map& x, double* mean, double* squares) = 0;
  virtual void map_products(const Map& dy, ConstData x, const double* mean, const NormSums& sums) = 0;
  virtual void map_combine(const Combination& c) = 0;
  // to += from
  virtual void map_add(const Map& from, Data to) = 0;

  // ------------------------------------------------------------------------------------------------------- blocks

  // The block of the passes that follow. Its shortcut is no part of them.
  virtual void set_block(const BlockShape& s, const BlockWeights& weights) = 0;
  // Expansion and depthwise convolution: the depthwise outputs, unless `hidden` is null; their mean and sum of centred
  // squares.
  virtual void hidden(ConstData x, Data hidden, double* mean, double* squares) = 0;
  // The projection of `hidden` after norm and activation; recomputes hidden if null.
  virtual void project(ConstData x, ConstData hidden, const BatchNorm& depthwise, Data out) = 0;
  // Before the two passes below, which then scale d_project, unless it is null.
  virtual void set_backward(const double* project_scale) = 0;
  // From the gradient of the projection's output. `hidden` is read if it is `saved`; else it is recomputed, and stored
  // unless null. d_hidden: the gradient of the depthwise norm's output; or null.
  virtual void project_backward(ConstData x, Data hidden, bool saved, Data d_hidden, ConstData d_project,
                                const BatchNorm& depthwise, const ProjectGradients& found) = 0;
  // The backward of the depthwise norm and of all before it. Maps that are null are recomputed.
  virtual void hidden_backward(ConstData x, ConstData hidden, ConstData d_hidden, ConstData d_project,
                               const BatchNorm& depthwise, const BatchNormBackward& backward,
                               const HiddenGradients& found) = 0;

  // ---------------------------------------------------------------------------- small maps, channel by channel
  //
  // With the statistics of this process's batch, a hidden channel needs no other one until the projection. If its maps
  // stay in a cache, the passes below compute it at once, forward or backward, in place of the first norm's closed
  // form. A backend need not have them. Weights are unfolded; all norms use the batch.

  virtual bool by_channels(const BlockShape&) const { return false; }
  // Elements of the expansion's output, in the backend's layout.
  virtual int64_t expanded_size(const BlockShape&) const { return 0; }
  // Of set_block(): expansion and depthwise convolution with their norms, see hidden(). expanded: where the expansion's
  // output is saved; or null.
  virtual void hidden_by_channels(ConstData, const Conv& /*expand*/, const Conv& /*depthwise*/, Data /*expanded*/,
                                  Data /*hidden*/, const BatchNorm& /*expand_norm*/,
                                  const BatchNorm& /*depthwise_norm*/) {}
  // The whole backward from the projection's output to x, or to the depthwise norm unless it goes `deeper`.
  virtual void backward_by_channels(ConstData /*x*/, ConstData /*expanded*/, ConstData /*d_project*/,
                                    const BatchNorm& /*expand_norm*/, const BatchNorm& /*depthwise_norm*/,
                                    bool /*deeper*/, const ChannelGradients&) {}
  // clamp(norm(weight x)) of a block's expansion by itself, and the norm.
  virtual void linear_by_channels(const BlockShape&, ConstData /*x*/, ConstData /*weight*/, const Conv&,
                                  const BatchNorm&, Data /*y*/) {}
  virtual void linear_backward_by_channels(const BlockShape&, ConstData /*x*/, ConstData /*dy*/, ConstData /*weight*/,
                                           const BatchNorm&, const ChannelGradients&) {}

  // ------------------------------------------------------------------------------------------- dense convolutions

  // x in any layout: strides of n, c, h, w.
  // What each output pixel reads: (n, h_out, w_out, kernel * kernel * c_in).
  virtual void windows(const DenseShape& s, ConstData x, const int64_t strides[4], Data out) = 0;
  // The adjoint: adds windows up into a map (n, h, w, c_in).
  virtual void add_windows(const DenseShape& s, ConstData windows, Data out) = 0;
  // The weights (c_out, c_in, kernel, kernel) as a matrix (c_out, kernel * kernel * c_in), or `back`.
  virtual void window_matrix(const DenseShape& s, ConstData from, bool back, Data to) = 0;
  // The convolution with a norm folded in, and the clamp.
  virtual void dense(const DenseShape& s, ConstData x, const int64_t strides[4], ConstData weight, const double* scale,
                     const double* shift, Data y) = 0;
  // The backward of clamp(scale * (weight x) + shift), a block's expansion by itself, from the gradient of its output.
  virtual void linear_backward(const BlockShape& s, ConstData x, ConstData dy, ConstData weight, const double* scale,
                               const double* shift, const LinearGradients& found) = 0;

  // ------------------------------------------------------------------------------------- vectors over channels
  //
  // Implemented here for vectors in host memory.

  // The norm of an input with this mean and sum of centred squares over `count` pixels.
  virtual void norm(const Conv& conv, int64_t channels, const double* mean, const double* squares, double count,
                    const BatchNorm& norm);
  // Sums over all `count` pixels; null for fixed statistics.
  virtual void norm_backward(const BatchNorm& norm, int64_t channels, const double* sum_dy,
                             const double* sum_dy_centred, double count, const BatchNormBackward& backward);
  // out = a * b, or a copy of a if b is null.
  virtual void multiply(int64_t size, const double* a, const double* b, double* out);
  virtual void fill(int64_t size, double value, double* out);
  // A number, for the host. May wait for the device.
  virtual double load(const double* from);
  // Between the moments of one process's `count` pixels and sums over all processes: sums (1 + channels + squares) are
  // the count, the channels' sums and their raw squares; squares are (channels), or products (channels, channels).
  virtual void to_sums(double count, int64_t channels, bool products, const double* mean, const double* squares,
                       double* sums);
  // Returns the count.
  virtual double from_sums(int64_t channels, bool products, const double* sums, double* mean, double* squares);
};

}  // namespace mnv2::train
