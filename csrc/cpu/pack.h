// Copies folded fp32 weights into the layouts of layout.h. Torch-free.
#pragma once

#include "layout.h"

namespace mnv2 {

struct BlockWeights {
  const float* expand;       // (c_hidden, c_in), or null
  const float* expand_bias;  // (c_hidden), or null
  const float* depthwise;    // (c_hidden, kernel, kernel)
  const float* depthwise_bias;
  const float* project;  // (c_out, c_hidden)
  const float* project_bias;
};

// `packed` holds block_layout(...).size floats.
void pack_block(int64_t c_in, int64_t c_hidden, int64_t c_out, int64_t kernel, const BlockWeights& weights, Lanes lanes,
                float* packed);

// weight (c_out, c_in, kernel, kernel); `packed` holds stem_size(...) floats.
void pack_stem(int64_t c_in, int64_t c_out, int64_t kernel, const float* weight, const float* bias, Lanes lanes,
               float* packed);

// conv (c_last, c_in), classifier (classes, c_last); `packed` holds head_size(...) floats.
void pack_head(int64_t c_in, int64_t c_last, int64_t classes, const float* conv, const float* conv_bias,
               const float* classifier, const float* classifier_bias, Lanes lanes, float* packed);

}  // namespace mnv2
