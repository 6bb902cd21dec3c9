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

CudaLaunch cuda_plan(const BlockShape& shape, DType dtype, bool exact, const std::string& name) {
  if (const char* rule = broken_rule(shape)) throw std::invalid_argument(std::string("plan: ") + rule);
  const cuda::Device device = cuda::known_device(name);
  CudaLaunch launch{"block", shape, cuda::plan_block(shape, dtype, device), {}, {}};
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
  if (!plan.joined)
    facts.launches.push_back({"stem",
                              {},
                              {},
                              cuda::stem_grid(cuda::stem_args(s.stem, dtype, device)),
                              cuda::stem_load(s.stem, dtype, exact, device)});
  for (size_t i = 0; i < s.blocks.size(); ++i) {
    const cuda::BlockPlan& block = plan.blocks[i];
    const bool with_stem = plan.joined && i == 0;
    const BlockShape shape = with_stem ? cuda::joined(s.stem, s.blocks[i]) : s.blocks[i];
    const cuda::BlockArgs args =
        with_stem ? cuda::joined_args(s.stem, shape, block, dtype) : cuda::block_args(shape, block, dtype);
    facts.launches.push_back({"block " + std::to_string(i + 1), shape, block, cuda::block_grid(block, args),
                              with_stem ? cuda::joined_load(s.stem, shape, block, dtype, exact, device)
                                        : cuda::block_load(shape, block, dtype, exact, device)});
  }
  facts.launches.push_back({"pool",
                            {},
                            {},
                            cuda::pool_grid(cuda::pool_args(s.head, dtype, device)),
                            cuda::pool_load(s.head, dtype, exact, device)});
  facts.launches.push_back({"classify",
                            {},
                            {},
                            cuda::classify_grid(cuda::classify_args(s.head, dtype)),
                            cuda::classify_load(s.head, dtype, device)});
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
