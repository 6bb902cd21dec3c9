#include "network.h"

#include <algorithm>

namespace mnv2 {
namespace {

// Floats of a map that does not stay in a core's cache beside what is made of it.
constexpr int64_t kLargeMap = 65536;

// Fused, the stem's output never exists, and a first block without expansion need not copy it.
bool fuses(const NetworkShape& s) { return !s.blocks.empty() && !s.blocks[0].has_expand && !s.blocks[0].residual; }

// Elements of the step's output for one image.
int64_t map_size(const Launch& step) {
  return step.has_block ? h_out(step.block) * w_out(step.block) * step.block.c_out
                        : h_out(step.stem) * w_out(step.stem) * step.stem.c_out;
}

int64_t stem_weights(const StemShape& s, Lanes lanes) { return stem_size(s.c_in, s.c_out, s.kernel, lanes); }

int64_t block_weights(const BlockShape& b, Lanes lanes) {
  return block_layout(b.c_in, b.c_hidden, b.c_out, b.kernel, b.has_expand, lanes).size;
}

// TensorFlow's "SAME", asked for by paddings of -1: out = ceil(in / stride), the odd pixel at the bottom and right.
template <class Shape>
void resolve_same_padding(Shape& s, int64_t dilation) {
  if (s.pad_top != -1 || s.pad_left != -1 || s.pad_bottom != -1 || s.pad_right != -1) return;
  if (s.stride < 1 || s.kernel > 63 || dilation > (1 << 20)) return;  // broken_rule tells
  const auto total = [&](int64_t size) {
    return std::max<int64_t>(0, (divide_up(size, s.stride) - 1) * s.stride + kernel_extent(s.kernel, dilation) - size);
  };
  s.pad_top = total(s.h) / 2, s.pad_bottom = total(s.h) - s.pad_top;
  s.pad_left = total(s.w) / 2, s.pad_right = total(s.w) - s.pad_left;
}

// Resolves the unit's padding; whether it breaks no rule.
template <class Shape>
bool complete(const std::string& unit, Shape& shape, int64_t dilation, std::string* rule) {
  resolve_same_padding(shape, dilation);
  if (const char* broken = broken_rule(shape)) *rule = unit + ": " + broken;
  return rule->empty();
}

}  // namespace

NetworkShape network_shape(int64_t n, int64_t h, int64_t w, int64_t c, const NetworkArguments& arguments,
                           std::string* rule) {
  const auto& [stem, blocks, head, bounds] = arguments;
  constexpr size_t kStem = 7, kBlock = 11, kHead = 2;
  const size_t count = blocks.size() / kBlock;
  NetworkShape s{};
  if (stem.size() != kStem || blocks.size() % kBlock || head.size() != kHead || bounds.size() != 2 * (count + 2)) {
    *rule = "stem, blocks, head and bounds must have 7, 11 a block, 2 and 2 a unit values, got " +
            std::to_string(stem.size()) + ", " + std::to_string(blocks.size()) + ", " + std::to_string(head.size()) +
            " and " + std::to_string(bounds.size());
    return s;
  }
  const auto lo = [&bounds = bounds](size_t unit) { return static_cast<float>(bounds[2 * unit]); };
  const auto hi = [&bounds = bounds](size_t unit) { return static_cast<float>(bounds[2 * unit + 1]); };
  s.stem = {n, h, w, c, stem[0], stem[1], stem[2], stem[3], stem[4], stem[5], stem[6], lo(0), hi(0)};
  if (!complete("stem", s.stem, 1, rule)) return s;
  h = h_out(s.stem), w = w_out(s.stem), c = s.stem.c_out;
  for (size_t i = 1; i <= count; ++i) {
    const int64_t* b = blocks.data() + (i - 1) * kBlock;
    BlockShape block{n,    h,    w,    c,    b[0],      b[1],       b[2],  b[3], b[4],
                     b[5], b[6], b[7], b[8], b[9] != 0, b[10] != 0, lo(i), hi(i)};
    if (!complete("block " + std::to_string(i), block, block.dilation, rule)) return s;
    h = h_out(block), w = w_out(block), c = block.c_out;
    s.blocks.push_back(block);
  }
  s.head = {n, h, w, c, head[0], head[1], lo(count + 1), hi(count + 1)};
  if (const char* broken = broken_rule(s.head)) *rule = std::string("head: ") + broken;
  return s;
}

int64_t network_size(const NetworkShape& s, Lanes lanes) {
  int64_t size = stem_weights(s.stem, lanes) + head_size(s.head.c_in, s.head.c_last, s.head.classes, lanes);
  for (const BlockShape& block : s.blocks) size += block_weights(block, lanes);
  return size;
}

NetworkPlan plan_network(const NetworkShape& s, DType dtype, const Machine& machine) {
  NetworkPlan p{};
  p.fused_stem = fuses(s);
  std::vector<Launch> steps(1);  // each on all images
  steps[0].has_stem = true;
  steps[0].stem = s.stem;
  p.head_weights = stem_weights(s.stem, machine.lanes);
  for (size_t i = 0; i < s.blocks.size(); ++i) {
    if (i > 0 || !p.fused_stem) steps.push_back({});
    steps.back().has_block = true;
    steps.back().block = s.blocks[i];
    steps.back().block_weights = p.head_weights;
    p.head_weights += block_weights(s.blocks[i], machine.lanes);
  }

  const int64_t n = s.stem.n;
  p.steps = static_cast<int64_t>(steps.size());
  p.slice = n;
  if (n > 2 * machine.threads) {
    p.slice = 2 * machine.threads;
    while (p.large < p.steps && (p.large == 0 || map_size(steps[p.large - 1]) > kLargeMap)) ++p.large;
  }

  // Maps take turns in two pairs of buffers, one pair for slices and one, which the last map of a slice goes to, for
  // the whole batch.
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
