#include "run.h"

#include <algorithm>
#include <optional>

#include "../plan_cache.h"
#include "arguments.h"

namespace mnv2 {
namespace cuda {
namespace {

constexpr int64_t kAlignment = 256;

// Offsets in memory that is allocated later.
struct Layout {
  int64_t size = 0;

  int64_t add(int64_t bytes) {
    const int64_t at = size;
    size += round_up(bytes, kAlignment);
    return at;
  }
};

bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

const char* launch_block(const KernelTable& table, const BlockPlan& plan, BlockArgs& args, void* partial, void* tickets,
                         Stream stream) {
  args.partial = static_cast<float*>(partial);
  args.tickets = static_cast<uint32_t*>(tickets);
  args.vectors_in = args.vectors_in && aligned(args.x);
  args.vectors_out = args.vectors_out && aligned(args.y);
  return table.block(args, plan, stream);
}

// For an operator's first kernel: it starts when everything ahead of it has ended, also what wrote the weights. So the
// kernels after it may read weights before they wait. Every thread of a kernel waits for the kernel ahead of it before
// it touches any other memory. That kernel could end only because its threads had waited likewise. So behind the wait
// all earlier kernels have ended: maps of any of them may be read, and their memory written over.
Stream first_of(Stream stream) {
  stream.dependent_launch = false;
  return stream;
}

int64_t packed_bytes(const NetworkUnit& unit, DType dtype) {
  switch (unit.kind) {
    case UnitKind::kDense: return dense_size(unit.dense, dtype);
    case UnitKind::kBlock: return block_size(unit.block, dtype);
    default: return head_size(unit.head.c_in, unit.head.c_last, unit.head.classes, dtype);
  }
}

const char* launch_stem(const KernelTable& table, const DenseShape& s, DType dtype, const Device& device,
                        const Images& x, const unsigned char* packed, const float* image_bias, void* y, Stream stream) {
  StemArgs args = stem_args(s, x, dtype, device);
  args.packed = packed, args.image_bias = image_bias, args.y = y;
  args.vectors_out = args.vectors_out && aligned(y);
  return table.stem(args, stream);
}

// first: the stream of the first of its two kernels.
const char* launch_head(const KernelTable& table, const HeadShape& s, DType dtype, const Device& device, const void* x,
                        const unsigned char* packed, unsigned char* memory, void* y, Stream first, Stream stream) {
  PoolArgs pool = pool_args(s, dtype, device);
  pool.x = x, pool.packed = packed, pool.pooled = memory;
  pool.vectors_in = pool.vectors_in && aligned(x);
  if (const char* error = table.pool(pool, first)) return error;
  ClassifyArgs classify = classify_args(s, dtype, device);
  classify.pooled = memory, classify.packed = packed + matrix_size(s.c_in, s.c_last, dtype), classify.y = y;
  return table.classify(classify, stream);
}

}  // namespace

BlockPlan known_plan(const BlockShape& s, DType dtype, const Device& device, const DenseShape* stem) {
  struct Key {
    BlockShape shape;
    std::optional<DenseShape> stem;
    DType dtype;
    Device device;

    bool operator==(const Key&) const = default;
  };
  static PlanCache<Key, BlockPlan> plans(1024);
  const Key key{s, stem ? std::optional(*stem) : std::nullopt, dtype, device};
  return *plans.get(key, [&] { return plan_block(s, dtype, device, stem); });
}

Memory block_memory(const BlockPlan& plan) {
  const int64_t tickets = plan.tickets * 4;
  return {round_up(plan.partial * 4, kAlignment) + tickets, tickets};
}

const char* run_block(const KernelTable& table, const BlockShape& s, const BlockPlan& plan, DType dtype, const void* x,
                      const unsigned char* packed, unsigned char* memory, void* y, Stream stream) {
  BlockArgs args = block_args(s, plan, dtype);
  args.x = x, args.y = y;
  set_packed(args, packed);
  const Memory needed = block_memory(plan);
  return launch_block(table, plan, args, memory, memory + needed.size - needed.tickets, first_of(stream));
}

const char* run_stem(const KernelTable& table, const DenseShape& s, DType dtype, const Device& device, const Images& x,
                     const unsigned char* packed, const float* image_bias, void* y, Stream stream) {
  return launch_stem(table, s, dtype, device, x, packed, image_bias, y, first_of(stream));
}

Memory head_memory(const HeadShape& s, DType dtype) { return {s.n * pooled_row(s) * element_bytes(dtype), 0}; }

const char* run_head(const KernelTable& table, const HeadShape& s, DType dtype, const Device& device, const void* x,
                     const unsigned char* packed, unsigned char* memory, void* y, Stream stream) {
  return launch_head(table, s, dtype, device, x, packed, memory, y, first_of(stream), stream);
}

int64_t network_size(const NetworkShape& s, DType dtype) {
  int64_t size = 0;
  for (const NetworkUnit& unit : s.units) size += packed_bytes(unit, dtype);
  return size;
}

namespace {

// Whether the network's first launch is a block whose hidden channels are not split. The launches after it begin to use
// tickets only when it has ended, as they do with its output.
bool clears_tickets(const NetworkShape& s, const NetworkPlan& plan) {
  const bool first = !s.units.empty() && (plan.joined || s.units[0].kind == UnitKind::kBlock);
  return first && plan.blocks[0].splits == 1;
}

}  // namespace

NetworkPlan plan_network(const NetworkShape& s, DType dtype, const Device& device) {
  NetworkPlan p{};
  const auto count = static_cast<int64_t>(s.units.size());
  const auto plan_of = [&](const BlockShape& block, const DenseShape* stem) {
    return known_plan(stem ? joined(*stem, block) : block, dtype, device, stem);
  };
  p.joined = joins_stem(s) && plan_of(s.units[1].block, &s.units[0].dense).fits;
  Arena arena;
  int64_t partial = 0, pooled = 0, outputs = 0;
  for (int64_t i = 0; i < count; ++i) {
    const NetworkUnit& unit = s.units[static_cast<size_t>(i)];
    if (unit.kind == UnitKind::kBlock) {
      const BlockPlan plan = plan_of(unit.block, p.joined && i == 1 ? &s.units[0].dense : nullptr);
      p.blocks.push_back(plan);
      partial = std::max(partial, plan.partial * 4);
      p.tickets += plan.tickets * 4;
    } else if (unit.kind == UnitKind::kHead) {
      pooled = std::max(pooled, head_memory(unit.head, dtype).size);
    }
    MapPlace place{-1, 0};
    if (unit.tap) {
      place.output = outputs++;
    } else if (!p.joined || i > 0) {
      const ImageSize map = output_of(unit);
      const int64_t bytes = map.n * map.h * map.w * map.c * element_bytes(dtype);
      place.offset = arena.place(i, last_reader(s, i), round_up(bytes, kAlignment));
    }
    p.maps.push_back(place);
  }
  Layout layout{arena.size()};
  p.partial = layout.add(partial);
  p.pooled = layout.add(pooled);
  p.memory.size = layout.size + p.tickets;
  p.memory.tickets = clears_tickets(s, p) ? 0 : p.tickets;
  return p;
}

const char* run_network(const KernelTable& table, const NetworkShape& s, const NetworkPlan& plan, DType dtype,
                        const Device& device, const Images& x, const unsigned char* packed, unsigned char* memory,
                        void* const* outputs, Stream stream) {
  unsigned char* tickets = memory + plan.memory.size - plan.tickets;
  const unsigned char* const stem = packed;
  size_t block = 0;
  Stream next = first_of(stream);
  const auto map = [&](int64_t unit) {
    const MapPlace& place = plan.maps[static_cast<size_t>(unit)];
    return place.output < 0 ? memory + place.offset : static_cast<unsigned char*>(outputs[place.output]);
  };
  for (int64_t i = 0; i < static_cast<int64_t>(s.units.size()); ++i) {
    const NetworkUnit& unit = s.units[static_cast<size_t>(i)];
    const bool computes_stem = plan.joined && i == 1;
    const unsigned char* const weights = packed;
    packed += packed_bytes(unit, dtype);
    if (plan.joined && i == 0) continue;
    const void* const in = unit.source == kImages || computes_stem ? nullptr : map(unit.source);
    const char* error = nullptr;
    if (unit.kind == UnitKind::kDense) {
      const Images images = unit.source == kImages ? x : dense_images(unit.dense, in);
      error = launch_stem(table, unit.dense, dtype, device, images, weights, nullptr, map(i), next);
    } else if (unit.kind == UnitKind::kHead) {
      error = launch_head(table, unit.head, dtype, device, in, weights, memory + plan.pooled, map(i), next, stream);
    } else {
      const BlockPlan& tiles = plan.blocks[block++];
      BlockArgs args;
      if (computes_stem) {
        const DenseShape& dense = s.units[0].dense;
        args = joined_args(dense, x, joined(dense, unit.block), tiles, dtype);
        args.stem = stem;
      } else {
        args = block_args(unit.block, tiles, dtype);
        args.x = in;
      }
      set_packed(args, weights);
      args.y = map(i);
      if (block == 1 && clears_tickets(s, plan)) args.clears = static_cast<int32_t>(plan.tickets / 4);
      error = launch_block(table, tiles, args, memory + plan.partial, tickets, next);
      tickets += tiles.tickets * 4;
    }
    if (error) return error;
    next = stream;
  }
  return nullptr;
}

}  // namespace cuda
}  // namespace mnv2
