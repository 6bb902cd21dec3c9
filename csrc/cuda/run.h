// Runs blocks, heads and networks as launches, over memory that the caller provides. Torch-free; the table has
// the launchers.
#pragma once

#include <vector>

#include "../network.h"
#include "launch.h"

namespace mnv2 {
namespace cuda {

// Bytes of memory that a run needs besides input and output. The last `tickets` bytes must be zeros.
struct Memory {
  int64_t size, tickets;
};

// plan_block(), computed once for each shape, number of images, dtype and device.
BlockPlan known_plan(const BlockShape& shape, DType dtype, const Device& device, const DenseShape* stem = nullptr);

Memory block_memory(const BlockPlan& plan);
// Every run_ function returns null, or the error of a launch. Its first kernel waits for everything ahead of it, also
// with a stream's dependent launch; the others may then read weights before the kernel ahead of them has ended.
const char* run_block(const KernelTable& table, const BlockShape& shape, const BlockPlan& plan, DType dtype,
                      const void* x, const unsigned char* packed, unsigned char* memory, void* y, Stream stream);

// `image_bias`: (n, c_out), replaces the packed bias; or null.
const char* run_stem(const KernelTable& table, const DenseShape& shape, DType dtype, const Device& device,
                     const Images& x, const unsigned char* packed, const float* image_bias, void* y, Stream stream);

Memory head_memory(const HeadShape& shape, DType dtype);
const char* run_head(const KernelTable& table, const HeadShape& shape, DType dtype, const Device& device, const void* x,
                     const unsigned char* packed, unsigned char* memory, void* y, Stream stream);

// Bytes of the packed weights of all units, one after the other.
int64_t network_size(const NetworkShape& shape, DType dtype);

struct NetworkPlan {
  bool joined;                    // stem and block 1 are one
  std::vector<BlockPlan> blocks;  // in the order of the network's blocks
  std::vector<MapPlace> maps;     // each unit's output; unused for a stem that is joined
  int64_t partial, pooled;        // bytes from the memory's start, where the arena is, too
  int64_t tickets;                // bytes at the memory's end
  Memory memory;                  // the first launch clears the tickets if it has none itself
};
// All units fit, see unfit().
NetworkPlan plan_network(const NetworkShape& shape, DType dtype, const Device& device);
const char* run_network(const KernelTable& table, const NetworkShape& shape, const NetworkPlan& plan, DType dtype,
                        const Device& device, const Images& x, const unsigned char* packed, unsigned char* memory,
                        void* const* outputs, Stream stream);

}  // namespace cuda
}  // namespace mnv2
