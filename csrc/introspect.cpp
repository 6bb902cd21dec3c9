#include "introspect.h"

#include <algorithm>
#include <chrono>
#include <stdexcept>

#include "cpu/dispatch.h"
#include "cpu/scratch.h"
#include "cpu/stages.h"

namespace mnv2 {

std::vector<std::pair<std::string, std::string>> build_info() {
  return {
      {"version", MNV2_FUSED_VERSION},   {"compiler", MNV2_FUSED_COMPILER}, {"build_type", MNV2_FUSED_BUILD_TYPE},
      {"torch", MNV2_FUSED_BUILD_TORCH}, {"cuda", MNV2_FUSED_BUILD_CUDA},
  };
}

std::string cpu_isa() { return kernels().name; }
std::vector<std::string> cpu_supported_isas() {
  std::vector<std::string> names;
  for (const KernelTable* table : supported_kernels()) names.push_back(table->name);
  return names;
}
Machine cpu_machine(int64_t threads) { return machine(threads); }
void cpu_pretend_caches(int64_t l1, int64_t l2) { pretend_caches(l1, l2); }

BlockPlan cpu_plan(const BlockShape& shape, DType dtype, const Machine& machine) {
  if (const char* rule = broken_rule(shape)) throw std::invalid_argument(std::string("plan: ") + rule);
  return plan_block(shape, dtype, machine);
}

NetworkFacts cpu_network_plan(const ImageSize& x, const NetworkArguments& arguments, DType dtype,
                              const Machine& machine) {
  std::string rule;
  const NetworkShape shape = network_from(x, arguments, &rule);
  if (!rule.empty()) throw std::invalid_argument("plan: " + rule);
  const NetworkPlan plan = plan_network(shape, dtype, machine);
  return {plan.fused_stem, plan.steps, plan.slice, plan.large, 4 * plan.arena};
}

CudaLaunch cuda_plan(const BlockShape& shape, DType dtype, bool exact, const std::string& name,
                     const std::optional<cuda::ChosenTile>& tile) {
  if (const char* rule = broken_rule(shape)) throw std::invalid_argument(std::string("plan: ") + rule);
  const cuda::Device device = cuda::known_device(name);
  CudaLaunch launch{"block", shape, {}, {}, {}};
  launch.plan = tile ? cuda::plan_chosen(shape, dtype, device, *tile) : cuda::plan_block(shape, dtype, device);
  if (!launch.plan.fits) return launch;
  launch.grid = cuda::block_grid(launch.plan, cuda::block_args(shape, launch.plan, dtype));
  launch.load = cuda::block_load(shape, launch.plan, dtype, exact, device);
  return launch;
}

CudaNetworkFacts cuda_network_plan(const ImageSize& x, const NetworkArguments& arguments, DType dtype, bool exact,
                                   const std::string& name) {
  std::string rule;
  const NetworkShape s = network_from(x, arguments, &rule);
  if (!rule.empty()) throw std::invalid_argument("plan: " + rule);
  const cuda::Device device = cuda::known_device(name);
  if (x.n == 0 || !cuda::unfit(s, dtype, device.shared_block).empty()) return {};
  const cuda::NetworkPlan plan = cuda::plan_network(s, dtype, device);
  CudaNetworkFacts facts{true, plan.joined, plan.memory.size, cuda::network_size(s, dtype), {}};
  size_t blocks = 0;
  for (int64_t i = plan.joined ? 1 : 0; i < static_cast<int64_t>(s.units.size()); ++i) {
    const NetworkUnit& unit = s.units[static_cast<size_t>(i)];
    const std::string unit_name = name_of(s, i);
    if (unit.kind == UnitKind::kDense) {
      const Images images = dense_images(unit.dense, nullptr);
      facts.launches.push_back({unit_name,
                                {},
                                {},
                                cuda::stem_grid(cuda::stem_args(unit.dense, images, dtype, device)),
                                cuda::stem_load(unit.dense, dtype, exact, device)});
    } else if (unit.kind == UnitKind::kBlock) {
      const cuda::BlockPlan& block = plan.blocks[blocks++];
      const bool with_stem = plan.joined && i == 1;
      const DenseShape& stem = s.units[0].dense;
      const BlockShape shape = with_stem ? cuda::joined(stem, unit.block) : unit.block;
      const cuda::BlockArgs args = with_stem ? cuda::joined_args(stem, dense_images(stem, nullptr), shape, block, dtype)
                                             : cuda::block_args(shape, block, dtype);
      BlockShape shown = shape;
      if (with_stem) shown.c_in = stem.kernel * stem.kernel * stem.c_in;  // without what fills up the kernel's sum
      facts.launches.push_back({unit_name, shown, block, cuda::block_grid(block, args),
                                with_stem ? cuda::joined_load(stem, shape, block, dtype, exact, device)
                                          : cuda::block_load(shape, block, dtype, exact, device)});
    } else {
      facts.launches.push_back({"pool",
                                {},
                                {},
                                cuda::pool_grid(cuda::pool_args(unit.head, dtype, device)),
                                cuda::pool_load(unit.head, dtype, exact, device)});
      facts.launches.push_back({"classify",
                                {},
                                {},
                                cuda::classify_grid(cuda::classify_args(unit.head, dtype, device)),
                                cuda::classify_load(unit.head, dtype, device)});
    }
  }
  return facts;
}

cuda::Device cuda_device(const std::string& name) { return cuda::known_device(name); }

std::string cuda_unfit(const BlockShape& shape, DType dtype, int64_t shared_block) {
  const char* rule = broken_rule(shape);
  return rule ? rule : cuda::unfit(shape, dtype, shared_block);
}
std::string cuda_unfit(const DenseShape& shape, DType dtype) {
  const char* rule = broken_rule(shape);
  return rule ? rule : cuda::unfit(shape, dtype);
}
std::string cuda_unfit(const HeadShape& shape) {
  const char* rule = broken_rule(shape);
  return rule ? rule : cuda::unfit(shape);
}
std::string cuda_unfit(const ImageSize& x, const NetworkArguments& arguments, DType dtype, int64_t shared_block) {
  std::string rule;
  const NetworkShape shape = network_from(x, arguments, &rule);
  return rule.empty() ? cuda::unfit(shape, dtype, shared_block) : rule;
}

int64_t cpu_scratch_high_water() { return scratch_high_water(); }
void cpu_reset_scratch_high_water() { reset_scratch_high_water(); }

double cpu_fma_peak() {
  using Clock = std::chrono::steady_clock;
  constexpr int64_t kIterations = 200'000;
  const KernelTable& table = kernels();
  alignas(64) float out[16];
  double best = 0;
  const auto start = Clock::now();
  while (Clock::now() - start < std::chrono::milliseconds(20)) {
    const auto before = Clock::now();
    table.multiply_add(kIterations, out);
    const std::chrono::duration<double> seconds = Clock::now() - before;
    best = std::max(best, static_cast<double>(kIterations * table.multiply_add_count) / seconds.count());
  }
  return best;
}

void run_alongside(void (*function)(void*), void* data) { set_alongside({function, data}); }

}  // namespace mnv2
