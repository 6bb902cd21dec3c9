#include "network.h"

#include <algorithm>

namespace mnv2 {
namespace {

// Floats of a map that does not stay in a core's cache beside what is made of it.
constexpr int64_t kLargeMap = 65536;

// Fused, the stem's output never exists, and a first block without expansion need not copy it.
bool fuses(const NetworkShape& s) { return !s.blocks.empty() && !s.blocks[0].has_expand && !s.blocks[0].residual; }

}  // namespace

int64_t map_size(const Step& step) {
  return step.block ? h_out(*step.block) * w_out(*step.block) * step.block->c_out
                    : h_out(*step.stem) * w_out(*step.stem) * step.stem->c_out;
}

int64_t stem_weights(const Step& step, Lanes lanes) {
  const StemShape* s = step.stem;
  return s ? stem_size(s->c_in, s->c_out, s->kernel, lanes) : 0;
}

int64_t block_weights(const Step& step, Lanes lanes) {
  const BlockShape* b = step.block;
  return b ? block_layout(b->c_in, b->c_hidden, b->c_out, b->kernel, b->has_expand, lanes).size : 0;
}

int64_t network_size(const NetworkShape& s, Lanes lanes) {
  int64_t size = stem_weights({&s.stem, nullptr}, lanes) + head_size(s.head.c_in, s.head.c_last, s.head.classes, lanes);
  for (const BlockShape& block : s.blocks) size += block_weights({nullptr, &block}, lanes);
  return size;
}

NetworkPlan plan_network(const NetworkShape& s, DType dtype, const Machine& machine) {
  NetworkPlan p{};
  const bool fused = fuses(s);
  p.steps.push_back({&s.stem, fused ? &s.blocks[0] : nullptr});
  for (size_t i = fused ? 1 : 0; i < s.blocks.size(); ++i) p.steps.push_back({nullptr, &s.blocks[i]});

  const int64_t n = s.stem.n, steps = static_cast<int64_t>(p.steps.size());
  p.slice = n;
  if (n > 2 * machine.threads) {
    p.slice = 2 * machine.threads;
    while (p.large < steps && (p.large == 0 || map_size(p.steps[p.large - 1]) > kLargeMap)) ++p.large;
  }
  for (int64_t i = 0; i < steps; ++i) {
    const Step& step = p.steps[i];
    const int64_t images = i < p.large ? p.slice : n;
    const bool whole = i + 1 >= p.large;
    int64_t& buffer = p.maps[whole][whole ? (i + 1 - p.large) % 2 : i % 2];
    const int64_t bytes = (whole ? n : images) * map_size(step) * dtype_bytes(dtype);
    buffer = std::max(buffer, round_up(divide_up(bytes, 4), kAlign));
    if (!step.block) continue;
    const BlockPlan block = plan_block(with_batch(*step.block, images), dtype, machine, step.stem);
    p.shared = std::max(p.shared, block.shared);
  }
  p.shared = std::max(p.shared, n * pooled_row(s.head, machine.lanes));
  p.shared = round_up(p.shared, kAlign);
  p.arena = p.maps[0][0] + p.maps[0][1] + p.maps[1][0] + p.maps[1][1] + p.shared;
  return p;
}

}  // namespace mnv2
