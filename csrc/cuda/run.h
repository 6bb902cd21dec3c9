// Blocks, heads and whole networks as launches, over memory that the caller provides. Torch-free; the table decides
// where the kernels run.
#pragma once

#include <vector>

#include "../network.h"
#include "launch.h"

namespace mnv2 {
namespace cuda {

// The images that a stem reads, in any layout; strides in elements.
struct Images {
  const void* data;
  int64_t strides[4];  // n, c, h, w
};

// Bytes of memory that is needed beside input and output. Its last `tickets` bytes must be zeros.
struct Memory {
  int64_t size, tickets;
};

// plan_block(), looked for once for each shape, number of images, dtype and device.
BlockPlan known_plan(const BlockShape& shape, DType dtype, const Device& device);

Memory block_memory(const BlockPlan& plan);
// Every run_ function returns null, or the error of a launch. With a stream's dependent launch its first kernel still
// waits for all before it, so that the others may read the weights before what is ahead of them has ended.
const char* run_block(const KernelTable& table, const BlockShape& shape, const BlockPlan& plan, DType dtype,
                      const void* x, const unsigned char* packed, unsigned char* memory, void* y, Stream stream);

const char* run_stem(const KernelTable& table, const DenseShape& shape, DType dtype, const Device& device,
                     const Images& x, const unsigned char* packed, void* y, Stream stream);

Memory head_memory(const HeadShape& shape, DType dtype);
const char* run_head(const KernelTable& table, const HeadShape& shape, DType dtype, const Device& device, const void* x,
                     const unsigned char* packed, unsigned char* memory, void* y, Stream stream);

// Bytes of the packed weights of all units, one after the other.
int64_t network_size(const NetworkShape& shape, DType dtype);

struct NetworkPlan {
  bool joined;  // stem and first block are one
  std::vector<BlockPlan> blocks;
  int64_t maps[2];          // maps alternate between two places; bytes from the memory's start
  int64_t partial, pooled;  // the same
  Memory memory;
};
// All units fit, see unfit().
NetworkPlan plan_network(const NetworkShape& shape, DType dtype, const Device& device);
const char* run_network(const KernelTable& table, const NetworkShape& shape, const NetworkPlan& plan, DType dtype,
                        const Device& device, const Images& x, const unsigned char* packed, unsigned char* memory,
                        void* y, Stream stream);

}  // namespace cuda
}  // namespace mnv2
