// What each kernel is given for a shape and a plan, and the grid in which it is launched.
#pragma once

#include "../network.h"
#include "args.h"
#include "plan.h"

namespace mnv2 {
namespace cuda {

// What a launch needs besides its kernel and arguments.
struct Grid {
  int64_t x, y, z;
  int64_t threads, shared;  // of a thread block; bytes
  int64_t cluster = 1;      // thread blocks along z
};

// All but the pointers.
BlockArgs block_args(const BlockShape& shape, const BlockPlan& plan, DType dtype);
void set_packed(BlockArgs& args, const unsigned char* packed);  // bias and weights
Grid block_grid(const BlockPlan& plan, const BlockArgs& args);
// Of stem and block in one, see joined(): all but the pointers to weights and output.
BlockArgs joined_args(const DenseShape& stem, const Images& x, const BlockShape& joined, const BlockPlan& plan,
                      DType dtype);

// All but the pointers to weights and output.
StemArgs stem_args(const DenseShape& shape, const Images& x, DType dtype, const Device& device);
Grid stem_grid(const StemArgs& args);

// The head's two kernels, all but the pointers; between them lie the pooled values, (n, pooled_row).
int64_t pooled_row(const HeadShape& shape);
PoolArgs pool_args(const HeadShape& shape, DType dtype, const Device& device);
Grid pool_grid(const PoolArgs& args);
ClassifyArgs classify_args(const HeadShape& shape, DType dtype, const Device& device);
Grid classify_grid(const ClassifyArgs& args);

// All but the pointers. Each element of `packed` is written by a thread of its own.
PackArgs block_pack_args(int64_t c_in, int64_t c_hidden, int64_t c_out, int64_t kernel, DType dtype);
// kernel: of a dense convolution; 1: a matrix.
PackArgs matrix_pack_args(int64_t channels, int64_t kernel, int64_t columns, DType dtype);
Grid pack_grid(const PackArgs& args);

}  // namespace cuda
}  // namespace mnv2
