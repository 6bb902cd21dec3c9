#include "network.h"

#include <algorithm>

namespace mnv2 {
namespace {

// Elements of a map that does not stay in a core's cache beside the map that is computed from it.
constexpr int64_t kLargeMap = 65536;

// Fused with a first block that has no expansion, the stem's output never exists and need not be copied.
bool fuses(const NetworkShape& s) { return !s.blocks.empty() && !s.blocks[0].has_expand && !s.blocks[0].residual; }

// Elements of the step's output for one image.
int64_t map_size(const Launch& step) {
  return step.has_block ? h_out(step.block) * w_out(step.block) * step.block.c_out
                        : h_out(step.stem) * w_out(step.stem) * step.stem.c_out;
}

// The steps without their maps, each on all images.
std::vector<Launch> steps_of(const NetworkShape& s, Lanes lanes, bool fused_stem) {
  std::vector<Launch> steps(1);
  steps[0].has_stem = true;
  steps[0].stem = s.stem;
  int64_t weights = kWeightBytes * stem_size(s.stem.c_in, s.stem.c_out, s.stem.kernel, lanes);
  for (size_t i = 0; i < s.blocks.size(); ++i) {
    if (i > 0 || !fused_stem) steps.push_back({});
    steps.back().has_block = true;
    steps.back().block = s.blocks[i];
    steps.back().block_weights = weights;
    weights += kWeightBytes * block_size(s.blocks[i], lanes);
  }
  return steps;
}

int64_t head_floats(const HeadShape& s, Lanes lanes) { return head_size(s.c_in, s.c_last, s.classes, lanes); }

}  // namespace

int64_t network_size(const NetworkShape& s, Lanes lanes) {
  int64_t size = stem_size(s.stem.c_in, s.stem.c_out, s.stem.kernel, lanes) + head_floats(s.head, lanes);
  for (const BlockShape& block : s.blocks) size += block_size(block, lanes);
  return size;
}

NetworkPlan plan_network(const NetworkShape& s, DType dtype, const Machine& machine) {
  NetworkPlan p{};
  p.fused_stem = fuses(s);
  const std::vector<Launch> steps = steps_of(s, machine.lanes, p.fused_stem);
  p.head_weights = kWeightBytes * (network_size(s, machine.lanes) - head_floats(s.head, machine.lanes));
  const int64_t n = s.stem.n;
  p.steps = static_cast<int64_t>(steps.size());
  p.slice = n;
  if (n > 2 * machine.threads) {
    p.slice = 2 * machine.threads;
    while (p.large < p.steps && (p.large == 0 || map_size(steps[p.large - 1]) > kLargeMap)) ++p.large;
  }

  // Maps take turns in two pairs of buffers: one pair for slices, and one for the whole batch, where also the last map
  // of every slice goes.
  const auto is_whole = [&](int64_t i) { return i + 1 >= p.large; };
  const auto turn = [&](int64_t i) { return is_whole(i) ? (i + 1 - p.large) % 2 : i % 2; };
  const auto bytes = [&](int64_t i, int64_t images) { return images * map_size(steps[i]) * dtype_bytes(dtype); };
  int64_t sizes[2][2] = {}, buffers[2][2];
  for (int64_t i = 0; i < p.steps; ++i) {
    int64_t& size = sizes[is_whole(i)][turn(i)];
    size = std::max(size, round_up(bytes(i, is_whole(i) ? n : p.slice), 4 * kAlign));
  }
  for (int whole = 0; whole < 2; ++whole) {
    for (int i = 0; i < 2; ++i) buffers[whole][i] = p.shared, p.shared += sizes[whole][i];
  }

  int64_t shared = n * pooled_row(s.head, machine.lanes);
  const auto launch = [&](int64_t i, int64_t first, int64_t images) {
    Launch l = steps[i];
    l.first = first;
    l.stem.n = l.block.n = images;
    if (l.has_block) l.plan = plan_block(l.block, dtype, machine, l.has_stem ? &l.stem : nullptr);
    shared = std::max(shared, l.plan.shared);
    l.in = p.head_in;
    l.out = buffers[is_whole(i)][turn(i)] + (i + 1 == p.large ? bytes(i, first) : 0);
    p.head_in = l.out;
    p.launches.push_back(l);
  };
  for (int64_t first = 0; p.large > 0 && first < n; first += p.slice) {
    for (int64_t i = 0; i < p.large; ++i) launch(i, first, std::min(p.slice, n - first));
  }
  if (p.large > 0) p.head_in = buffers[1][0];
  for (int64_t i = p.large; i < p.steps; ++i) launch(i, 0, n);
  p.arena = p.shared / 4 + round_up(shared, kAlign);
  return p;
}

}  // namespace mnv2
