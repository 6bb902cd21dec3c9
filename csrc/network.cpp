#include "network.h"

#include <algorithm>

namespace mnv2 {
namespace {

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

}  // namespace mnv2
