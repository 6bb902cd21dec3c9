#include "introspect.h"

#include <algorithm>
#include <chrono>
#include <cstring>
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

namespace {

// Regions up to this size are read whole, which covers biases, batch norm and depthwise taps.
constexpr int64_t kWhole = 65536;
constexpr int64_t kLine = 64;
constexpr int64_t kFetchAhead = 24;

uint64_t rotate(uint64_t word, int bits) { return word << bits | word >> (64 - bits); }

uint64_t mix(uint64_t hash, uint64_t word) { return rotate(hash ^ word, 29) * 0x9e3779b97f4a7c15u; }

uint64_t read(const unsigned char* p, int64_t bytes = 8) {
  uint64_t word = 0;
  std::memcpy(&word, p, static_cast<size_t>(bytes));
  return word;
}

// What is hashed was last touched a forward ago and is in no cache: it is fetched ahead, many lines at a time.
void fetch(const unsigned char* p) { __builtin_prefetch(p); }

uint64_t hash_whole(uint64_t hash, const unsigned char* p, int64_t bytes) {
  uint64_t lanes[8];  // independent chains: a multiplication takes its time
  for (uint64_t i = 0; i < 8; ++i) lanes[i] = hash + i;
  for (; bytes >= kLine; p += kLine, bytes -= kLine) {
    fetch(p + kFetchAhead * kLine);
    for (int i = 0; i < 8; ++i) lanes[i] = mix(lanes[i], read(p + 8 * i));
  }
  for (; bytes > 0; p += 8, bytes -= 8) lanes[0] = mix(lanes[0], read(p, std::min<int64_t>(bytes, 8)));
  for (int i = 1; i < 8; ++i) lanes[0] = mix(lanes[0], lanes[i]);
  return lanes[0];
}

// Walks along a diagonal that wraps around at the last row and at the last column of lines.
struct Diagonal {
  const Region& r;
  int64_t row = 0, column = 0;

  static int64_t columns(const Region& r) { return divide_up(r.row_bytes, kLine); }
  const unsigned char* next() {
    const unsigned char* line = r.data + row * r.row_bytes + std::min(column * kLine, r.row_bytes - kLine);
    if (++row == r.rows) row = 0;
    if (++column == columns(r)) column = 0;
    return line;
  }
};

// A cache line's length in every row and in every column of lines, and the end.
uint64_t hash_diagonal(uint64_t hash, const Region& r) {
  const int64_t steps = std::max(r.rows, Diagonal::columns(r));
  Diagonal ahead{r}, here{r};
  for (int64_t i = 0; i < kFetchAhead; ++i) fetch(ahead.next());
  const auto line = [&hash](const unsigned char* p) {
    uint64_t folded = 0;
    for (int i = 0; i < 8; ++i) folded ^= rotate(read(p + 8 * i), 7 * i + 1);
    hash = mix(hash, folded);
  };
  for (int64_t step = 0; step < steps; ++step) {
    fetch(ahead.next());
    line(here.next());
  }
  line(r.data + r.rows * r.row_bytes - kLine);
  return hash;
}

}  // namespace

bool counts_whole(const Region& r) { return r.rows * r.row_bytes <= kWhole || r.row_bytes < kLine; }

uint64_t fingerprint(const Region* regions, int64_t count) {
  uint64_t hash = 0;
  for (int64_t i = 0; i < count; ++i) {
    const Region& r = regions[i];
    if (i + 2 < count) {
      const Region& soon = regions[i + 2];
      for (int64_t l = 0; l < std::min<int64_t>(kFetchAhead, soon.rows * soon.row_bytes / kLine + 1); ++l)
        fetch(soon.data + l * kLine);
    }
    hash = counts_whole(r) ? hash_whole(hash, r.data, r.rows * r.row_bytes) : hash_diagonal(hash, r);
  }
  return hash;
}

}  // namespace mnv2
