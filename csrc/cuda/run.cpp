#include "run.h"

#include <algorithm>

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
// kernels after it may read weights before they wait.
Stream first_of(Stream stream) {
  stream.dependent_launch = false;
  return stream;
}

int64_t window_values(const DenseShape& s) { return s.kernel * s.kernel * s.c_in; }

int64_t map_bytes(const DenseShape& s, DType dtype) {
  return s.n * h_out(s) * w_out(s) * s.c_out * element_bytes(dtype);
}
int64_t map_bytes(const BlockShape& s, DType dtype) {
  return s.n * h_out(s) * w_out(s) * s.c_out * element_bytes(dtype);
}

int64_t packed_bytes(const DenseShape& s, DType dtype) { return matrix_size(window_values(s), s.c_out, dtype); }
int64_t packed_bytes(const BlockShape& s, DType dtype) { return block_size(s, dtype); }

const char* launch_stem(const KernelTable& table, const DenseShape& s, DType dtype, const Device& device,
                        const Images& x, const unsigned char* packed, void* y, Stream stream) {
  StemArgs args = stem_args(s, dtype, device);
  args.window = with_images(args.window, x);
  args.packed = packed, args.y = y;
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
  ClassifyArgs classify = classify_args(s, dtype);
  classify.pooled = memory, classify.packed = packed + matrix_size(s.c_in, s.c_last, dtype), classify.y = y;
  return table.classify(classify, stream);
}

}  // namespace

WindowArgs with_images(WindowArgs window, const Images& x) {
  window.x = x.data;
  window.stride_n = x.strides[0], window.stride_c = x.strides[1];
  window.stride_h = x.strides[2], window.stride_w = x.strides[3];
  return window;
}

BlockPlan known_plan(const BlockShape& s, DType dtype, const Device& device) {
  struct Key {
    BlockShape shape;
    DType dtype;
    Device device;

    bool operator==(const Key&) const = default;
  };
  static PlanCache<Key, BlockPlan> plans(1024);
  return *plans.get({s, dtype, device}, [&] { return plan_block(s, dtype, device); });
}

Memory block_memory(const BlockPlan& plan) {
  const int64_t tickets = plan.tickets * 4;
  return {round_up(plan.partial * 4, kAlignment) + tickets, tickets};
}

const char* run_block(const KernelTable& table, const BlockShape& s, const BlockPlan& plan, DType dtype, const void* x,
                      const unsigned char* packed, unsigned char* memory, void* y, Stream stream) {
  BlockArgs args = block_args(s, plan, dtype);
  args.x = x, args.y = y;
  args.packed = packed, args.expand = packed + args.first;
  const Memory needed = block_memory(plan);
  return launch_block(table, plan, args, memory, memory + needed.size - needed.tickets, first_of(stream));
}

const char* run_stem(const KernelTable& table, const DenseShape& s, DType dtype, const Device& device, const Images& x,
                     const unsigned char* packed, void* y, Stream stream) {
  return launch_stem(table, s, dtype, device, x, packed, y, first_of(stream));
}

Memory head_memory(const HeadShape& s, DType dtype) { return {s.n * pooled_row(s) * element_bytes(dtype), 0}; }

const char* run_head(const KernelTable& table, const HeadShape& s, DType dtype, const Device& device, const void* x,
                     const unsigned char* packed, unsigned char* memory, void* y, Stream stream) {
  return launch_head(table, s, dtype, device, x, packed, memory, y, first_of(stream), stream);
}

int64_t network_size(const NetworkShape& s, DType dtype) {
  int64_t size = packed_bytes(s.stem, dtype) + head_size(s.head.c_in, s.head.c_last, s.head.classes, dtype);
  for (const BlockShape& block : s.blocks) size += packed_bytes(block, dtype);
  return size;
}

NetworkPlan plan_network(const NetworkShape& s, DType dtype, const Device& device) {
  NetworkPlan p{};
  p.joined =
      !s.blocks.empty() && joins(s.stem, s.blocks[0]) && known_plan(joined(s.stem, s.blocks[0]), dtype, device).fits;
  int64_t maps[2] = {}, partial = 0, place = 0;
  const auto add_map = [&](int64_t bytes) {
    maps[place] = std::max(maps[place], bytes);
    place = 1 - place;
  };
  if (!p.joined) add_map(map_bytes(s.stem, dtype));
  for (const BlockShape& block : s.blocks) {
    const bool with_stem = p.joined && p.blocks.empty();
    const BlockPlan plan = known_plan(with_stem ? joined(s.stem, block) : block, dtype, device);
    p.blocks.push_back(plan);
    partial = std::max(partial, plan.partial * 4);
    p.memory.tickets += plan.tickets * 4;
    add_map(map_bytes(block, dtype));
  }
  Layout layout;
  p.maps[0] = layout.add(maps[0]), p.maps[1] = layout.add(maps[1]);
  p.partial = layout.add(partial);
  p.pooled = layout.add(head_memory(s.head, dtype).size);
  p.memory.size = layout.size + p.memory.tickets;
  return p;
}

const char* run_network(const KernelTable& table, const NetworkShape& s, const NetworkPlan& plan, DType dtype,
                        const Device& device, const Images& x, const unsigned char* packed, unsigned char* memory,
                        void* y, Stream stream) {
  unsigned char* tickets = memory + plan.memory.size - plan.memory.tickets;
  const unsigned char* const stem = packed;
  packed += packed_bytes(s.stem, dtype);
  const void* in = nullptr;
  int place = 0;
  Stream next = first_of(stream);
  if (!plan.joined) {
    if (const char* error = launch_stem(table, s.stem, dtype, device, x, stem, memory + plan.maps[0], next))
      return error;
    next = stream;
    in = memory + plan.maps[0];
    place = 1;
  }
  for (size_t i = 0; i < s.blocks.size(); ++i) {
    const BlockShape& block = s.blocks[i];
    BlockArgs args;
    if (plan.joined && i == 0) {
      args = joined_args(s.stem, joined(s.stem, block), plan.blocks[i], dtype);
      args.window = with_images(args.window, x);
      args.expand = stem;
    } else {
      args = block_args(block, plan.blocks[i], dtype);
      args.x = in;
      args.expand = packed + args.first;
    }
    args.packed = packed, args.y = memory + plan.maps[place];
    if (const char* error = launch_block(table, plan.blocks[i], args, memory + plan.partial, tickets, next))
      return error;
    next = stream;
    tickets += plan.blocks[i].tickets * 4;
    packed += packed_bytes(block, dtype);
    in = args.y;
    place = 1 - place;
  }
  return launch_head(table, s.head, dtype, device, in, packed, memory + plan.pooled, y, next, stream);
}

}  // namespace cuda
}  // namespace mnv2
