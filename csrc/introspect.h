// What the Python-visible module _C asks of libmnv2_fused. Neither Python nor torch appears here.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "api.h"
#include "cpu/network.h"
#include "cuda/arguments.h"
#include "cuda/cost.h"
#include "cuda/run.h"

namespace mnv2 {

// Name and value of each fact about the build.
MNV2_FUSED_API std::vector<std::pair<std::string, std::string>> build_info();

// Throws std::runtime_error where MNV2_FUSED_CPU_ISA asks for what the machine lacks.
MNV2_FUSED_API std::string cpu_isa();
MNV2_FUSED_API std::vector<std::string> cpu_supported_isas();

// The machine as the planner sees it.
MNV2_FUSED_API Machine cpu_machine(int64_t threads);

// Throws std::invalid_argument naming the rule that the shape breaks.
MNV2_FUSED_API BlockPlan cpu_plan(const BlockShape& shape, DType dtype, const Machine& machine);

// Of the whole network on n images of h x w x c; see NetworkPlan.
struct NetworkFacts {
  bool fused_stem;
  int64_t steps, slice, large;
  int64_t arena_bytes;
};
// Throws std::invalid_argument naming the unit and the rule that it breaks.
MNV2_FUSED_API NetworkFacts cpu_network_plan(const ImageSize& x, const NetworkArguments& arguments, DType dtype,
                                             const Machine& machine);

// A kernel's start on a GPU. Its name: "stem", "block 1" and so on, "pool", "classify".
struct CudaLaunch {
  std::string name;
  BlockShape shape;  // of a block as it runs, with the stem in it where they are joined
  cuda::BlockPlan plan;
  cuda::Grid grid;
  cuda::Load load;
};
// A block alone on the GPU that `device` names, "sm_80", "sm_86" or "sm_90"; `exact`: float32 without tf32. Throws
// std::invalid_argument as cpu_plan does, and for other names.
MNV2_FUSED_API CudaLaunch cuda_plan(const BlockShape& shape, DType dtype, bool exact, const std::string& device);
// The whole network there, see cuda::NetworkPlan; all is zero where it does not fit.
struct CudaNetworkFacts {
  bool fits, joined;
  int64_t memory_bytes, packed_bytes;
  std::vector<CudaLaunch> launches;
};
MNV2_FUSED_API CudaNetworkFacts cuda_network_plan(const ImageSize& x, const NetworkArguments& arguments, DType dtype,
                                                  bool exact, const std::string& device);
MNV2_FUSED_API cuda::Device cuda_device(const std::string& name);

// Why a unit cannot run on a GPU whose thread blocks can have so many bytes of shared memory, be it that the shape
// breaks a rule; empty: it can.
MNV2_FUSED_API std::string cuda_unfit(const BlockShape& shape, DType dtype, int64_t shared_block);
MNV2_FUSED_API std::string cuda_unfit(const DenseShape& shape, DType dtype);
MNV2_FUSED_API std::string cuda_unfit(const HeadShape& shape);
MNV2_FUSED_API std::string cuda_unfit(const ImageSize& x, const NetworkArguments& arguments, DType dtype,
                                      int64_t shared_block);

MNV2_FUSED_API int64_t cpu_scratch_high_water();
MNV2_FUSED_API void cpu_reset_scratch_high_water();

// Multiply-adds a second of one core on registers alone, in the ISA in use: the limit that figures are held against.
// Takes about 20 ms.
MNV2_FUSED_API double cpu_fma_peak();

// A function for this thread to run in its next call of a CPU operator, while other threads begin to compute.
MNV2_FUSED_API void run_alongside(void (*function)(void*), void* data);

}  // namespace mnv2
