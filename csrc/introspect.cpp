#include "introspect.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <stdexcept>

#include "cpu/dispatch.h"
#include "cpu/scratch.h"

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

namespace {

// Regions up to this size are read whole, which covers biases, batch norm and depthwise taps.
constexpr int64_t kWhole = 65536;

uint64_t mix(uint64_t hash, uint64_t word) {
  hash = (hash ^ word) * 0x9e3779b97f4a7c15u;
  return hash ^ (hash >> 29);
}

uint64_t read(const unsigned char* p, int64_t bytes = 8) {
  uint64_t word = 0;
  std::memcpy(&word, p, static_cast<size_t>(bytes));
  return word;
}

uint64_t hash_whole(uint64_t hash, const unsigned char* p, int64_t bytes) {
  uint64_t lanes[4] = {hash, ~hash, hash + 1, ~hash - 1};  // independent chains: a multiplication takes its time
  for (; bytes >= 32; p += 32, bytes -= 32) {
    for (int i = 0; i < 4; ++i) lanes[i] = mix(lanes[i], read(p + 8 * i));
  }
  for (; bytes > 0; p += 8, bytes -= 8) lanes[0] = mix(lanes[0], read(p, bytes < 8 ? bytes : 8));
  return mix(mix(lanes[0], lanes[1]), mix(lanes[2], lanes[3]));
}

// One word in every row and in every column of words, along a diagonal that wraps around, and the last word.
uint64_t hash_diagonal(uint64_t hash, const Region& r) {
  const int64_t words = divide_up(r.row_bytes, 8), steps = std::max(r.rows, words);
  for (int64_t step = 0, row = 0, word = 0; step < steps; ++step) {
    hash = mix(hash, read(r.data + row * r.row_bytes + std::min(word * 8, r.row_bytes - 8)));
    if (++row == r.rows) row = 0;
    if (++word == words) word = 0;
  }
  return mix(hash, read(r.data + r.rows * r.row_bytes - 8));
}

}  // namespace

uint64_t fingerprint(const Region* regions, int64_t count) {
  uint64_t hash = 0;
  for (int64_t i = 0; i < count; ++i) {
    const Region& r = regions[i];
    const int64_t bytes = r.rows * r.row_bytes;
    hash = bytes <= kWhole || r.row_bytes < 8 ? hash_whole(hash, r.data, bytes) : hash_diagonal(hash, r);
  }
  return hash;
}

}  // namespace mnv2
