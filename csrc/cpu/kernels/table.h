// What one ISA offers: a table of functions over raw pointers. Filled once per ISA by the files beside this one.
#pragma once

#include "../plan.h"
#include "../train_plan.h"

namespace mnv2 {

// What the stem reads: one image in any layout, and its packed weights.
struct StemInput {
  const DenseShape* shape;
  DType dtype;
  const void* x;
  int64_t stride_channel, stride_row, stride_column;  // of x, in elements
  const float* packed;                                // see layout.h
};

// One strip (output rows [rows.first, rows.last)) or one set of groups of one image of a block.
struct BlockTask {
  const BlockShape* shape;
  const BlockPlan* plan;
  DType dtype;
  const void* x;          // image (h, w, c_in); unused where there is a stem
  const StemInput* stem;  // makes the hidden channels of a block without expansion; or null
  void* y;                // image (h_out, w_out, c_out)
  const float* packed;    // see BlockLayout
  Range rows;
  Range groups;
  float* partial;  // (groups, h_out, w_out, c_out) of the image where its groups are shared out, else null
  float* scratch;  // plan->scratch floats, 64-byte aligned
};

// y = partial sums in order (+ x) over the pixels [pixels.first, pixels.last) of one image.
struct ReduceTask {
  const BlockShape* shape;
  const BlockPlan* plan;
  DType dtype;
  const void* x;
  void* y;
  const float* partial;
  Range pixels;
};

// Output rows [rows.first, rows.last) of one image of the stem.
struct StemTask {
  StemInput in;
  void* y;  // image (h_out, w_out, c_out)
  Range rows;
  float* scratch;  // stem_scratch() floats
};

// Panels [panels.first, panels.last) of the last 1x1 convolution over images [images.first, images.last).
struct PoolTask {
  const HeadShape* shape;
  DType dtype;
  const void* x;  // (n, h, w, c_in)
  const float* packed;
  float* pooled;       // (n, pooled_row)
  int64_t pooled_row;  // c_last rounded up to whole vectors
  Range images;
  Range panels;
  float* scratch;  // images * h * w * c_in floats where dtype is not fp32
};

// Panels [panels.first, panels.last) of the classes for all images.
struct ClassifyTask {
  const HeadShape* shape;
  DType dtype;
  const float* packed;
  const float* pooled;
  int64_t pooled_row;
  void* y;  // (n, classes)
  Range panels;
  float* scratch;  // n * panel width floats where dtype is not fp32
};

// Moments of a map over pixels [pixels.first, pixels.last): the channels' mean and the sum of centred products.
struct MomentsTask {
  const float* x;  // (pixels, channels)
  int64_t channels;
  Range pixels;
  double* mean;      // (channels)
  double* products;  // (channels, channels): on and above the diagonal of whole vectors
  float* scratch;    // moments_scratch() floats
};

// Mean and sum of centred squares of a linear map of what has the moments of a MomentsTask.
struct LinearMomentsTask {
  const float* weight;  // (rows, channels)
  int64_t channels;
  Range rows;
  const double* mean;      // (channels)
  const double* products;  // (channels, channels)
  double* out_mean;        // (rows)
  double* out_squares;     // (rows)
};

// Rows [range.first, range.last) of c (rows, row) = a' b of a (k, rows) and b (k, row).
struct ProductTask {
  int64_t k, rows;
  Range range;
  int64_t columns, row;  // of b that count; whole vectors
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

// Some pixels and hidden channels of a block in training. Maps are fp32 and dense in the order n, h, w, c.
//
// `packed` holds the block's weights in BlockLayout: the expansion with its batch norm folded in, depthwise and
// projection as they are, no bias elsewhere. `packed_backward` holds those of the block that takes the projection's
// gradient to the input's: the transposed projection as its expansion, the transposed folded expansion as its
// projection.
//
// Wide maps are (chunks, n * h_out * w_out, kChunk); a null one is made again where it is needed, a strip at a time.
struct TrainTask {
  const BlockShape* shape;
  const TrainPlan* plan;
  Range strips;  // of all images; of output rows, or in hidden_backward of input rows
  Range chunks;
  const float* x;
  const float* packed;
  const float* packed_backward;
  float* hidden;           // wide: depthwise outputs before their batch norm
  bool hidden_kept;        // they are there already
  float* hidden_gradient;  // wide: the gradient of that batch norm's output, 0 where the activation is clipped
  // Second batch norm, (hidden_row) each: scale and shift of its affine map, its mean, and what makes the gradient of
  // its input of that of its output and of its input: a * gradient + b * hidden + c; b null: 0.
  const float *scale, *shift, *mean;
  const float* backward[3];
  // A dense convolution alone, as a block without depthwise filter and projection: the gradient of its activated output
  // (n, h, w, c_hidden) instead of what a block has from here on; else null.
  const float* output_gradient;
  const float* z_gradient;  // (n, h_out, w_out, c_out): of the projection's output
  float* out;               // project: (n, h_out, w_out, c_out); hidden_backward: (n, h, w, c_in), or null
  // Sums, each (chunks, ..., kChunk); written by this task alone, which clears them first. Null: not wanted.
  float* project_weight;    // (c_out): z_gradient' activated
  float* depthwise_weight;  // (kernel * kernel)
  float* expand_weight;     // (c_in): x' gradient of the first batch norm's output
  // (hidden_row): in `hidden` its mean and centred squares; else the sums of hidden_gradient, of its product with
  // hidden - mean, and of the gradient of the first norm's output.
  double* sums[3];
  float* scratch;  // plan->scratch floats
};

struct KernelTable {
  const char* name;
  Lanes lanes;
  void (*block)(const BlockTask&);
  void (*reduce)(const ReduceTask&);
  void (*stem)(const StemTask&);
  void (*pool)(const PoolTask&);
  void (*classify)(const ClassifyTask&);
  void (*moments)(const MomentsTask&);
  void (*linear_moments)(const LinearMomentsTask&);
  void (*product)(const ProductTask&);
  void (*map_moments)(const MapTask&);   // sums: mean and centred squares of a
  void (*map_products)(const MapTask&);  // sums: of a, and of a * (b + shift)
  void (*map_combine)(const MapTask&);   // out = scale[0] * a + scale[1] * b + shift + c
  void (*input_backward)(const InputGradientTask&);
  void (*hidden)(const TrainTask&);                      // sums; writes `hidden` where it is not null
  void (*project)(const TrainTask&);                     // out, from `hidden`
  void (*project_backward)(const TrainTask&);            // project_weight, sums, hidden_gradient
  void (*hidden_backward)(const TrainTask&);             // depthwise_weight, expand_weight, sums, out
  void (*multiply_add)(int64_t iterations, float* out);  // iterations * multiply_add_count multiply-adds
  int64_t multiply_add_count;
};

extern const KernelTable kScalarKernels;
extern const KernelTable kAvx2Kernels;
extern const KernelTable kAvx512Kernels;

}  // namespace mnv2
