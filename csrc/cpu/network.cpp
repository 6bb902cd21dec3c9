#include "network.h"

#include <algorithm>

namespace mnv2 {
namespace {

// Elements of a map that does not stay in a core's cache beside the map that is computed from it.
constexpr int64_t kLargeMap = 65536;

int64_t unit_size(const NetworkUnit& unit, Lanes lanes) {
  switch (unit.kind) {
    case UnitKind::kDense: return stem_size(unit.dense.c_in, unit.dense.c_out, unit.dense.kernel, lanes);
    case UnitKind::kBlock: return block_size(unit.block, lanes);
    default: return head_size(unit.head.c_in, unit.head.c_last, unit.head.classes, lanes);
  }
}

// A launch on all images, and how long its map is needed.
struct Step {
  Launch launch;
  int64_t map;          // elements of its output for one image
  int64_t last_reader;  // the last step that reads its map, or itself
  bool tap;
};

// The steps without their maps' places. Each unit is a step, but a stem that block 1 computes.
std::vector<Step> steps_of(const NetworkShape& s, Lanes lanes, bool fused_stem) {
  std::vector<Step> steps;
  int64_t weights = 0;
  const int64_t joined = fused_stem ? 1 : 0;
  for (int64_t i = 0; i < static_cast<int64_t>(s.units.size()); ++i) {
    const NetworkUnit& unit = s.units[static_cast<size_t>(i)];
    if (i == 0 || i > joined) steps.push_back({});
    Step& step = steps.back();
    Launch& l = step.launch;
    if (unit.kind == UnitKind::kDense) l.has_dense = true, l.dense = unit.dense, l.dense_weights = weights;
    if (unit.kind == UnitKind::kBlock) l.has_block = true, l.block = unit.block, l.weights = weights;
    if (unit.kind == UnitKind::kHead) l.has_head = true, l.head = unit.head, l.weights = weights;
    weights += kWeightBytes * unit_size(unit, lanes);
    const ImageSize out = output_of(unit);
    step.map = out.h * out.w * out.c;
    step.tap = unit.tap;
    step.last_reader = last_reader(s, i) - joined;
    l.source = unit.source == kImages || (fused_stem && i == 1) ? kImages : unit.source - joined;
  }
  return steps;
}

// Steps at the beginning that have large maps which only the next step reads.
int64_t large_steps(const std::vector<Step>& steps) {
  const auto count = static_cast<int64_t>(steps.size());
  int64_t large = 0;
  while (large < count) {
    const Step& step = steps[static_cast<size_t>(large)];
    if (step.launch.has_head || step.launch.source != large - 1) break;
    if (large > 0) {
      const Step& before = steps[static_cast<size_t>(large - 1)];
      if (before.map <= kLargeMap || before.last_reader != large) break;
    }
    ++large;
  }
  return large;
}

}  // namespace

int64_t network_size(const NetworkShape& s, Lanes lanes) {
  int64_t size = 0;
  for (const NetworkUnit& unit : s.units) size += unit_size(unit, lanes);
  return size;
}

NetworkPlan plan_network(const NetworkShape& s, DType dtype, const Machine& machine) {
  NetworkPlan p{};
  p.fused_stem = joins_stem(s);
  std::vector<Step> steps = steps_of(s, machine.lanes, p.fused_stem);
  const int64_t n = s.images.n;
  p.steps = static_cast<int64_t>(steps.size());
  p.slice = n;
  if (n > 2 * machine.threads) {
    p.slice = 2 * machine.threads;
    p.large = large_steps(steps);
  }

  // The last map of every slice goes into one map of the whole batch, which is needed from the first slice on.
  Arena arena;
  int64_t outputs = 0;
  for (int64_t i = 0; i < p.steps; ++i) {
    Step& step = steps[static_cast<size_t>(i)];
    if (step.tap) {
      step.launch.out = {outputs++, 0};
      continue;
    }
    const int64_t bytes = (i + 1 < p.large ? p.slice : n) * step.map * dtype_bytes(dtype);
    step.launch.out = {-1, arena.place(i + 1 == p.large ? 0 : i, step.last_reader, round_up(bytes, 4 * kAlign))};
  }

  int64_t shared = 0;
  const auto launch = [&](int64_t i, int64_t first, int64_t images) {
    Launch l = steps[static_cast<size_t>(i)].launch;
    l.first = first;
    l.dense.n = l.block.n = l.head.n = images;
    if (l.has_block) l.plan = plan_block(l.block, dtype, machine, l.has_dense ? &l.dense : nullptr);
    shared = std::max({shared, l.plan.shared, l.has_head ? images * pooled_row(l.head, machine.lanes) : 0});
    const auto of_images = [&](int64_t step) {
      return first * steps[static_cast<size_t>(step)].map * dtype_bytes(dtype);
    };
    if (l.source != kImages) {
      l.in = steps[static_cast<size_t>(l.source)].launch.out;
      if (l.in.output >= 0) l.in.offset = of_images(l.source);
    }
    if (l.out.output >= 0 || i + 1 == p.large) l.out.offset += of_images(i);
    p.launches.push_back(l);
  };
  for (int64_t first = 0; p.large > 0 && first < n; first += p.slice) {
    for (int64_t i = 0; i < p.large; ++i) launch(i, first, std::min(p.slice, n - first));
  }
  for (int64_t i = p.large; i < p.steps; ++i) launch(i, 0, n);
  p.shared = arena.size();
  p.arena = p.shared / 4 + round_up(shared, kAlign);
  return p;
}

}  // namespace mnv2
