#include "network.h"

#include <algorithm>

namespace mnv2 {
namespace {

// Floats of a map that does not stay in a core's cache beside what is made of it.
constexpr int64_t kLargeMap = 65536;

// Fused, the stem's output never exists, and a first block without expansion need not copy it.
bool fuses(const NetworkShape& s) { return !s.blocks.empty() && !s.blocks[0].has_expand && !s.blocks[0].residual; }

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
