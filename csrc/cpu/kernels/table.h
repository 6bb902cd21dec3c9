// What one ISA offers: a table of functions over raw pointers. Filled once per ISA by the files beside this one.
#pragma once

#include "../plan.h"

namespace mnv2 {

// What the stem reads: one image in any layout, and its packed weights.
struct StemInput {
  const StemShape* shape;
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

struct KernelTable {
  const char* name;
  Lanes lanes;
  void (*block)(const BlockTask&);
  void (*reduce)(const ReduceTask&);
  void (*stem)(const StemTask&);
  void (*pool)(const PoolTask&);
  void (*classify)(const ClassifyTask&);
  void (*multiply_add)(int64_t iterations, float* out);  // iterations * multiply_add_count multiply-adds
  int64_t multiply_add_count;
};

extern const KernelTable kScalarKernels;
extern const KernelTable kAvx2Kernels;
extern const KernelTable kAvx512Kernels;

}  // namespace mnv2
