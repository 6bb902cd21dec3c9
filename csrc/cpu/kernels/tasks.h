// Tasks: the arguments of kernels, one piece of work each, as raw pointers and ranges.
//
// `packed` weights are bytes whose layout (see layout.h) and type belong to the family of kernels that reads them.
#pragma once

#include "../plan.h"
#include "../storage.h"
#include "../train_plan.h"

namespace mnv2 {

// --------------------------------------------------------------------------------------------------------- inference

// The stem's input: one image in any layout, and the stem's weights.
struct StemInput {
  const DenseShape* shape;
  Source x;
  int64_t stride_channel, stride_row, stride_column;  // of x, in elements
  const void* packed;
  const float* bias;  // replaces the packed bias, see image_bias_row(); or null
};

// Output rows [rows.first, rows.last) of output columns [columns.first, columns.last), or one set of groups, of one
// image of a block.
struct BlockTask {
  const BlockShape* shape;
  const BlockPlan* plan;
  Source x;               // image (h, w, c_in); unused if there is a stem
  const StemInput* stem;  // computes the hidden channels of a block without expansion; or null
  Sink y;                 // image (h_out, w_out, c_out); unused if there is `partial`
  const void* packed;     // see BlockLayout
  Range rows, columns;
  Range groups;
  float* partial;  // (groups, h_out, w_out, c_out) of the image if several tasks share its groups, else null
  float* scratch;  // plan->scratch floats, 64-byte aligned
};

// y = partial sums in order (+ x) over the pixels [pixels.first, pixels.last) of one image.
struct ReduceTask {
  const BlockShape* shape;
  const BlockPlan* plan;
  Source x;
  Sink y;
  const float* partial;
  Range pixels;
};

// Output rows [rows.first, rows.last) of one image of the stem.
struct StemTask {
  StemInput in;
  Sink y;  // image (h_out, w_out, c_out)
  Range rows;
  float* scratch;  // stem_scratch() floats
};

// Panels [panels.first, panels.last) of the last 1x1 convolution over images [images.first, images.last).
struct PoolTask {
  const HeadShape* shape;
  Source x;  // (n, h, w, c_in)
  const void* packed;
  float* pooled;       // (n, pooled_row)
  int64_t pooled_row;  // c_last rounded up to whole vectors
  Range images;
  Range panels;
  float* scratch;  // widened() floats of the images
};

// Panels [panels.first, panels.last) of the classes for all images.
struct ClassifyTask {
  const HeadShape* shape;
  const void* packed;
  const float* pooled;
  int64_t pooled_row;
  Sink y;  // (n, classes)
  Range panels;
  float* scratch;  // widened() floats of n * panel width
};

// ---------------------------------------------------------------------------------------------------------- training
//
// Maps are fp32 and dense in the order n, h, w, c. `d_x` is the gradient of the loss by x.

// Moments of a map over pixels [pixels.first, pixels.last): the channels' mean and the sum of centred products.
struct MomentsTask {
  const float* x;  // (pixels, channels)
  int64_t channels;
  Range pixels;
  double* mean;      // (channels)
  double* products;  // (channels, channels): on and above the diagonal of whole vectors
  bool exact;        // products in fp64
  float* scratch;    // moments_scratch() floats
};

// Mean and sum of centred squares of weight * x, from the moments of x.
struct LinearMomentsTask {
  const float* weight;  // (rows, channels)
  int64_t channels;
  Range rows;
  const double* mean;      // (channels)
  const double* products;  // (channels, channels)
  double* out_mean;        // (rows)
  double* out_squares;     // (rows)
  double* uncorrelated;    // (rows): the squares if the channels of x were uncorrelated
};

// Rows [range.first, range.last) of c (rows, row) = a' b of a (k, rows) and b (k, row).
struct ProductTask {
  int64_t k, rows;
  Range range;
  int64_t columns;  // of b
  int64_t row;      // columns rounded up to whole vectors
  const float *a, *b;
  float* c;
};

// Sums over the pixels of a narrow map, and elementwise work on it; every vector has `channels` elements.
struct MapTask {
  int64_t channels;
  Range pixels;
  const float* a;         // (pixels, channels)
  const float* b;         // the same; or null
  const float* c;         // the same; or null
  const float* scale[2];  // of a and b
  const float* shift;
  float* out;
  double* sums[2];
};

// out = a - x matrix - vector (+ residual) over pixels [pixels.first, pixels.last).
struct InputGradientTask {
  int64_t channels;
  Range pixels;
  const float* a;  // (pixels, channels)
  const float* x;
  const float* packed;    // the negated matrix and below it the negated vector: panels of channels + 1 rows
  const float* residual;  // or null
  float* out;
  float* scratch;  // input_gradient_scratch() floats
};

// Some pixels and hidden channels of a block in training:
//
//   x -> expand, norm, clamp -> depthwise = hidden -> norm, clamp = activated -> project
//
// `packed` holds the block's weights in BlockLayout: the expansion with its norm folded in, depthwise and projection
// as they are, no bias elsewhere. `packed_backward` holds the weights of backward_shape(): the transposed projection as
// its expansion, the transposed folded expansion as its projection.
//
// Wide maps are (chunks, pixels, kChunk), of the n * h_out * w_out pixels of the output unless said otherwise; a null
// one is recomputed, a strip at a time.
struct TrainTask {
  const BlockShape* shape;
  const TrainPlan* plan;
  Range strips;  // of all images; of output rows, or in hidden_backward of input rows
  Range chunks;
  int64_t first_chunk;  // of wide maps and of sums of weights
  const float* x;
  const void* packed;
  const void* packed_backward;
  float* hidden;     // wide
  bool hidden_kept;  // it has been computed already
  float* d_hidden;   // wide: gradient of the depthwise norm's output, 0 where the activation is clipped
  // Channel by channel, over the pixels of the input. Then `packed` has no norm folded in.
  float* expanded;    // wide: the expansion before its norm, made by expand(), read by all others; or null
  float* d_expanded;  // wide: gradient of the norm's output, in linear_backward() of its input; or null
  const float *expand_scale, *expand_shift, *expand_mean;  // that norm's, (hidden_row) each
  // The depthwise norm's scale, shift and mean, (hidden_row) each.
  const float *scale, *shift, *mean;
  // Its backward, or in linear_backward() that of the expansion's norm: d_input = backward[0] * d_output + backward[1]
  // * input + backward[2]. backward[1] may be null: 0.
  const float* backward[3];
  // Set for a dense convolution alone, a block that ends at the expansion's clamp: the gradient of its output (n, h, w,
  // c_hidden). Null for a block.
  const float* d_out;
  const float* d_project;  // (n, h_out, w_out, c_out): gradient of the projection's output
  float* out;              // project: (n, h_out, w_out, c_out); gradients of x: (n, h, w, c_in), or null
  const float* residual;   // added to the gradient of x; or null
  // Sums that this task alone writes, and clears first; null if not wanted. (chunks, ..., kChunk) each:
  float* d_project_weight;    // (c_out): d_project' activated
  float* d_depthwise_weight;  // (kernel * kernel)
  float* d_expand_weight;     // (c_in): x' d_expand; d_expand is the gradient of the expansion's norm's output
  // (hidden_row) each:
  double *mean_hidden, *squares_hidden;  // mean and sum of centred squares
  double *sum_dy, *sum_dy_centred;       // of d_hidden, and of d_hidden * (hidden - mean)
  double* sum_d_expand;
  double* sum_d_expand_linear;  // of d_expand * (expanded - bias), or - expand_mean; 0 without an expansion
  float* scratch;               // plan->scratch floats
};

}  // namespace mnv2
