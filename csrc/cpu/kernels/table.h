// The kernels of one ISA: a table of functions for each family. Filled once per ISA by the files beside this one.
#pragma once

#include "tasks.h"

namespace mnv2 {

// A family of inference kernels computes with one type and packs its weights in that type.
struct InferenceKernels {
  void (*block)(const BlockTask&);
  void (*reduce)(const ReduceTask&);
  void (*stem)(const StemTask&);
  void (*pool)(const PoolTask&);
  void (*classify)(const ClassifyTask&);
};

struct TrainingKernels {
  void (*moments)(const MomentsTask&);
  void (*linear_moments)(const LinearMomentsTask&);
  void (*product)(const ProductTask&);
  void (*map_moments)(const MapTask&);   // sums: mean and centred squares of a
  void (*map_products)(const MapTask&);  // sums: of a, and of a * (b - shift)
  void (*map_combine)(const MapTask&);   // out = scale[0] * a + scale[1] * b + shift + c
  void (*input_backward)(const InputGradientTask&);
  void (*expand)(const TrainTask&);            // expanded; its mean_hidden, squares_hidden unless they are null
  void (*normalise)(const TrainTask&);         // out (n, h, w, c_hidden): the expansion's norm and clamp
  void (*hidden)(const TrainTask&);            // mean_hidden, squares_hidden, `hidden` unless it is null
  void (*project)(const TrainTask&);           // out, from `hidden`
  void (*project_backward)(const TrainTask&);  // d_project_weight, sum_dy, sum_dy_centred, d_hidden
  void (*hidden_backward)(const TrainTask&);   // the other gradients and sums; in one pass, with sum_dy, all of them
  void (*linear_backward)(const TrainTask&);   // from d_expanded: itself, and d_expand_weight
  void (*input_gradient)(const TrainTask&);    // out, from d_expanded
};

struct KernelTable {
  const char* name;
  Lanes lanes;
  InferenceKernels floats;  // fp32 arithmetic and weights, activations of any DType
  TrainingKernels training;
  void (*multiply_add)(int64_t iterations, float* out);  // iterations * multiply_add_count multiply-adds
  int64_t multiply_add_count;
};

extern const KernelTable kScalarKernels;
extern const KernelTable kAvx2Kernels;
extern const KernelTable kAvx512Kernels;

}  // namespace mnv2
