#include "network.h"

namespace mnv2 {
namespace {

template <class Shape>
bool is_sound(const std::string& unit, const Shape& shape, std::string* rule) {
  if (const char* broken = broken_rule(shape)) *rule = unit + ": " + broken;
  return rule->empty();
}

}  // namespace

NetworkShape network_from(const ImageSize& x, const NetworkArguments& arguments, std::string* rule) {
  const auto& [stem, blocks, head, bounds] = arguments;
  constexpr size_t kStem = count_of(kDenseFields), kBlock = count_of(kBlockFields), kHead = count_of(kHeadFields);
  const size_t count = blocks.size() / kBlock;
  NetworkShape s{};
  if (stem.size() != kStem || blocks.size() % kBlock || head.size() != kHead || bounds.size() != 2 * (count + 2)) {
    const auto text = [](size_t value) { return std::to_string(value); };
    *rule = "stem, blocks, head and bounds must have " + text(kStem) + ", " + text(kBlock) + " a block, " +
            text(kHead) + " and 2 a unit values, got " + text(stem.size()) + ", " + text(blocks.size()) + ", " +
            text(head.size()) + " and " + text(bounds.size());
    return s;
  }
  const auto activation = [&bounds = bounds](size_t unit) {
    return Activation{.lo = static_cast<float>(bounds[2 * unit]), .hi = static_cast<float>(bounds[2 * unit + 1])};
  };
  s.stem = dense_from(x, stem.data(), activation(0));
  if (!is_sound("stem", s.stem, rule)) return s;
  ImageSize map{x.n, h_out(s.stem), w_out(s.stem), s.stem.c_out};
  for (size_t i = 1; i <= count; ++i) {
    const BlockShape block = block_from(map, blocks.data() + (i - 1) * kBlock, activation(i));
    if (!is_sound("block " + std::to_string(i), block, rule)) return s;
    map = {x.n, h_out(block), w_out(block), block.c_out};
    s.blocks.push_back(block);
  }
  s.head = head_from(map, head.data(), activation(count + 1));
  is_sound("head", s.head, rule);
  return s;
}

}  // namespace mnv2
