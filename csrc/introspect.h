// The functions of libmnv2_fused that the Python module _C calls. Free of Python and torch.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "api.h"
#include "cpu/crowding.h"
#include "cpu/network.h"
#include "cuda/arguments.h"
#include "cuda/cost.h"
#include "cuda/run.h"
#include "train/passes.h"

namespace mnv2 {

// Name and value of each fact about the build.
MNV2_FUSED_API std::vector<std::pair<std::string, std::string>> build_info();

// Throws std::runtime_error if MNV2_FUSED_CPU_ISA names an instruction set that the machine lacks.
MNV2_FUSED_API std::string cpu_isa();
MNV2_FUSED_API std::vector<std::string> cpu_supported_isas();

// The machine as the planner sees it.
MNV2_FUSED_API Machine cpu_machine(int64_t threads);
// Lets planners see caches of other sizes, in bytes; 0 for the machine's own. Plans of whole networks that exist
// already stay as they are. For tests.
MNV2_FUSED_API void cpu_pretend_caches(int64_t l1, int64_t l2);

// Throws std::invalid_argument naming the rule that the shape breaks.
MNV2_FUSED_API BlockPlan cpu_plan(const BlockShape& shape, DType dtype, const Machine& machine);

// The plan of a whole network on images of size x; see NetworkPlan.
struct NetworkFacts {
  bool fused_stem;
  int64_t steps, slice, large;
  int64_t arena_bytes;
};
// Throws std::invalid_argument naming the unit and the rule that it breaks.
MNV2_FUSED_API NetworkFacts cpu_network_plan(const ImageSize& x, const NetworkArguments& arguments, DType dtype,
                                             const Machine& machine);

// One kernel launch on a GPU.
struct CudaLaunch {
  std::string name;  // "stem", "block 1" and so on, "pool", "classify"
  BlockShape shape;  // a block as it runs, including the stem if they are joined; zeros for other kernels
  cuda::BlockPlan plan;
  cuda::Grid grid;
  cuda::Load load;
};
// The launch of one block. device: "sm_80", "sm_86" or "sm_90". exact: float32 without tf32. Throws
// std::invalid_argument for an unknown device, and for a shape that breaks a rule. tile: not the quickest plan, but
// this one: rows, columns and images of a tile, splits, and whether chunks are expanded ahead.
using CudaTile = std::array<int64_t, 5>;
MNV2_FUSED_API CudaLaunch cuda_plan(const BlockShape& shape, DType dtype, bool exact, const std::string& device,
                                    const std::optional<cuda::ChosenTile>& tile = {});
// The launches of a whole network; see cuda::NetworkPlan. All fields are zero if the network does not fit the GPU.
struct CudaNetworkFacts {
  bool fits, joined;
  int64_t memory_bytes, packed_bytes;
  std::vector<CudaLaunch> launches;
};
MNV2_FUSED_API CudaNetworkFacts cuda_network_plan(const ImageSize& x, const NetworkArguments& arguments, DType dtype,
                                                  bool exact, const std::string& device);
MNV2_FUSED_API cuda::Device cuda_device(const std::string& name);

// Why a unit cannot run on a GPU whose thread blocks can have `shared_block` bytes of shared memory; empty if it can. A
// shape that breaks a rule cannot run.
MNV2_FUSED_API std::string cuda_unfit(const BlockShape& shape, DType dtype, int64_t shared_block);
MNV2_FUSED_API std::string cuda_unfit(const DenseShape& shape, DType dtype);
MNV2_FUSED_API std::string cuda_unfit(const HeadShape& shape);
MNV2_FUSED_API std::string cuda_unfit(const ImageSize& x, const NetworkArguments& arguments, DType dtype,
                                      int64_t shared_block);

MNV2_FUSED_API int64_t cpu_scratch_high_water();
MNV2_FUSED_API void cpu_reset_scratch_high_water();

// Peak multiply-adds a second of one core, on registers alone, in the ISA in use. Takes about 20 ms.
MNV2_FUSED_API double cpu_fma_peak();

// Drops the weights that cached_* operators on the CPU packed for the cache of that name.
MNV2_FUSED_API void cpu_forget(const std::string& cache);
// How often these operators have packed weights in this process.
MNV2_FUSED_API int64_t cpu_packings();

// How many threads the next operator that this thread calls on the CPU may use, itself included.
MNV2_FUSED_API int64_t cpu_threads();

// Sets a function that this thread runs during its next call of a CPU operator, while other threads begin to compute.
MNV2_FUSED_API void run_alongside(void (*function)(void*), void* data);

// The passes of training on the CPU, in fp32, and their specification in float64. For tests.
MNV2_FUSED_API std::unique_ptr<train::Passes> cpu_train_passes();
MNV2_FUSED_API std::unique_ptr<train::Passes> reference_train_passes();
// Sets the most pixels, at first kChannelsPixels, with which a block trains channel by channel on the CPU. Returns what
// it was. For tests.
MNV2_FUSED_API int64_t limit_channels(int64_t pixels);

}  // namespace mnv2
