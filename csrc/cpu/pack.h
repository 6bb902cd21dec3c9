// Copies folded fp32 weights into the layouts of layout.h, for the float kernels. Torch-free.
#pragma once

#include "layout.h"
#include "stages.h"

namespace mnv2 {

// Convolutions of a block with the scale and shift of a batch norm behind each, by output channel.
struct BlockWeights {
  const float* expand;     // (c_hidden, c_in), or null
  const float* depthwise;  // (c_hidden, kernel, kernel)
  const float* project;    // (c_out, c_hidden)
  struct Norm {
    const double *scale, *shift;  // null: 1, 0
  } expand_norm, depthwise_norm, project_norm;
};

// `packed` holds block_layout(...).size floats.
void pack_block(int64_t c_in, int64_t c_hidden, int64_t c_out, int64_t kernel, const BlockWeights& weights, Lanes lanes,
                const ParallelFor& parallel, float* packed);

// The backward of the block's linear maps as a block of its own, from c_out to c_in (see backward_shape()): the
// transposed projection expands, the transposed expansion projects. `packed` holds block_layout(c_out, c_hidden, c_in,
// kernel, true,
// ...).size floats. Without an expansion the projection stays zero.
void pack_backward(int64_t c_in, int64_t c_hidden, int64_t c_out, int64_t kernel, const BlockWeights& weights,
                   Lanes lanes, const ParallelFor& parallel, float* packed);

// weight (c_out, c_in, kernel, kernel); `packed` holds stem_size(...) floats.
void pack_stem(int64_t c_in, int64_t c_out, int64_t kernel, const float* weight, const float* bias, Lanes lanes,
               float* packed);

// conv (c_last, c_in), classifier (classes, c_last); `packed` holds head_size(...) floats.
void pack_head(int64_t c_in, int64_t c_last, int64_t classes, const float* conv, const float* conv_bias,
               const float* classifier, const float* classifier_bias, Lanes lanes, float* packed);

}  // namespace mnv2
