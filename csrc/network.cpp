#include "network.h"

#include <algorithm>
#include <charconv>

namespace mnv2 {
namespace {

constexpr int64_t kUnitCount = count_of(kUnitFields);

// Integers and bounds that describe a unit of a kind; zeros for an unknown kind.
struct Lengths {
  int64_t fields, bounds;
};
Lengths lengths_of(int64_t kind) {
  switch (static_cast<UnitKind>(kind)) {
    case UnitKind::kDense: return {count_of(kDenseFields), 2};
    case UnitKind::kBlock: return {count_of(kBlockFields), 4};
    case UnitKind::kHead: return {count_of(kHeadFields), 2};
  }
  return {};
}

const char* broken_rule(const NetworkUnit& unit) {
  switch (unit.kind) {
    case UnitKind::kDense: return mnv2::broken_rule(unit.dense);
    case UnitKind::kBlock: return mnv2::broken_rule(unit.block);
    default: return mnv2::broken_rule(unit.head);
  }
}

// Appends the numbers of a text to `values`. Returns what is no number in it, or "".
template <class T>
std::string parse(const std::string& text, std::vector<T>& values) {
  const char* next = text.data();
  const char* const end = next + text.size();
  while (next < end) {
    T value{};
    const auto [stop, error] = std::from_chars(next, end, value);
    if (error != std::errc() || (stop < end && (*stop != ' ' || stop + 1 == end))) {
      return "'" + std::string(next, std::find(next, end, ' ')) + "'";
    }
    values.push_back(value);
    next = stop < end ? stop + 1 : end;
  }
  return "";
}

// The rule that the unit's place in the network breaks, or nullptr.
const char* broken_place(const NetworkShape& s, const NetworkUnit& unit) {
  const auto count = static_cast<int64_t>(s.units.size());
  if (unit.source < kImages || unit.source >= count) return "its source must be the images or a unit before it";
  if (unit.source == kImages && unit.kind != UnitKind::kDense) return "only a dense convolution can take the images";
  if (unit.source >= 0 && s.units[static_cast<size_t>(unit.source)].kind == UnitKind::kHead)
    return "its source must not be a head";
  if (count == 0 && unit.kind != UnitKind::kDense) return "the first unit must be a dense convolution";
  if (unit.kind == UnitKind::kHead && !unit.tap) return "a head must be an output";
  return nullptr;
}

}  // namespace

NetworkShape network_from(const ImageSize& x, const NetworkArguments& arguments, std::string* rule) {
  NetworkShape s{x, {}};
  std::vector<int64_t> values;
  std::vector<double> bounds;
  if (const std::string wrong = parse(arguments.units, values); !wrong.empty())
    *rule = "units must be integers with a space between them, got " + wrong;
  else if (const std::string wrong = parse(arguments.bounds, bounds); !wrong.empty())
    *rule = "bounds must be numbers with a space between them, got " + wrong;
  if (!rule->empty()) return s;
  size_t next = 0, bound = 0;
  const auto fail = [&](const std::string& text) {
    *rule = "unit " + std::to_string(s.units.size()) + ": " + text;
    return s;
  };
  while (next < values.size()) {
    const size_t left = values.size() - next;
    const Lengths lengths = lengths_of(values[next]);
    if (lengths.fields == 0) return fail("its kind must be 0, 1 or 2, got " + std::to_string(values[next]));
    const size_t needed = static_cast<size_t>(kUnitCount + lengths.fields);
    if (left < needed) return fail("it must have " + std::to_string(needed) + " integers, got " + std::to_string(left));
    if (bounds.size() - bound < static_cast<size_t>(lengths.bounds))
      return fail("it must have " + std::to_string(lengths.bounds) + " bounds, got " +
                  std::to_string(bounds.size() - bound));
    NetworkUnit unit{};
    unit.kind = static_cast<UnitKind>(values[next]);
    unit.source = values[next + 1];
    unit.tap = values[next + 2] != 0;
    if (const char* broken = broken_place(s, unit)) return fail(broken);
    const ImageSize in = unit.source == kImages ? x : output_of(s.units[static_cast<size_t>(unit.source)]);
    const int64_t* fields = values.data() + next + kUnitCount;
    const auto activation = [&](size_t i) {
      return Activation{static_cast<float>(bounds[bound + 2 * i]), static_cast<float>(bounds[bound + 2 * i + 1])};
    };
    switch (unit.kind) {
      case UnitKind::kDense: unit.dense = dense_from(in, fields, activation(0)); break;
      case UnitKind::kBlock: unit.block = block_from(in, fields, activation(0), activation(1)); break;
      case UnitKind::kHead: unit.head = head_from(in, fields, activation(0)); break;
    }
    next += needed;
    bound += static_cast<size_t>(lengths.bounds);
    s.units.push_back(unit);
    if (const char* broken = broken_rule(unit)) {
      *rule = name_of(s, static_cast<int64_t>(s.units.size()) - 1) + ": " + broken;
      return s;
    }
  }
  if (s.units.empty()) return fail("there must be at least one unit");
  if (bound < bounds.size())
    *rule =
        "bounds must have " + std::to_string(bound) + " values for these units, got " + std::to_string(bounds.size());
  for (int64_t i = 0; i < static_cast<int64_t>(s.units.size()) && rule->empty(); ++i) {
    if (!s.units[static_cast<size_t>(i)].tap && last_reader(s, i) == i)
      *rule = name_of(s, i) + ": its output must be taken by a unit or be an output";
  }
  return s;
}

std::string any_bounds(const std::string& units) {
  std::vector<int64_t> values;
  parse(units, values);
  std::string bounds;
  for (size_t next = 0; next < values.size();) {
    const Lengths lengths = lengths_of(values[next]);
    if (lengths.fields == 0) break;  // network_from() reports it
    for (int64_t i = 0; i < lengths.bounds; i += 2) bounds += bounds.empty() ? "-inf inf" : " -inf inf";
    next += static_cast<size_t>(kUnitCount + lengths.fields);
  }
  return bounds;
}

ImageSize output_of(const NetworkUnit& unit) {
  switch (unit.kind) {
    case UnitKind::kDense: return {unit.dense.n, h_out(unit.dense), w_out(unit.dense), unit.dense.c_out};
    case UnitKind::kBlock: return {unit.block.n, h_out(unit.block), w_out(unit.block), unit.block.c_out};
    default: return {unit.head.n, 1, 1, unit.head.classes};
  }
}

std::string name_of(const NetworkShape& s, int64_t unit) {
  static constexpr const char* kNames[] = {"dense", "block", "head"};
  const NetworkUnit& named = s.units[static_cast<size_t>(unit)];
  if (named.source == kImages) return "stem";
  const auto alike = [&](const NetworkUnit& u) { return u.kind == named.kind && u.source != kImages; };
  const auto place = std::count_if(s.units.begin(), s.units.begin() + unit + 1, alike);
  return std::string(kNames[static_cast<int>(named.kind)]) + " " + std::to_string(place);
}

int64_t last_reader(const NetworkShape& s, int64_t unit) {
  for (auto i = static_cast<int64_t>(s.units.size()) - 1; i > unit; --i) {
    if (s.units[static_cast<size_t>(i)].source == unit) return i;
  }
  return unit;
}

bool joins_stem(const NetworkShape& s) {
  if (s.units.size() < 2 || s.units[0].tap || last_reader(s, 0) != 1) return false;
  const NetworkUnit& next = s.units[1];
  return next.kind == UnitKind::kBlock && !next.block.has_expand && !next.block.residual;
}

int64_t Arena::place(int64_t first, int64_t last, int64_t bytes) {
  int64_t begin = 0;
  for (const Map& map : maps_) {  // the first gap that is large enough
    if (map.last < first || map.first > last) continue;
    if (begin + bytes <= map.begin) break;
    begin = std::max(begin, map.end);
  }
  const auto at = std::find_if(maps_.begin(), maps_.end(), [&](const Map& map) { return map.begin > begin; });
  maps_.insert(at, {first, last, begin, begin + bytes});
  size_ = std::max(size_, begin + bytes);
  return begin;
}

}  // namespace mnv2
