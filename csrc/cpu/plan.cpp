#include "plan.h"

#include <algorithm>

namespace mnv2 {

int64_t parts_for_threads(int64_t n, int64_t threads, int64_t most) {
  if (n < 1 || threads < 2) return 1;
  int64_t best = 1;
  double best_idle = 1.0;
  for (int64_t parts = 1; parts <= most; ++parts) {
    const int64_t tasks = n * parts;
    const double idle = 1.0 - static_cast<double>(tasks) / static_cast<double>(divide_up(tasks, threads) * threads);
    if (idle <= 0.1) return parts;
    if (idle < best_idle) best = parts, best_idle = idle;
    if (tasks > 16 * threads) break;
  }
  return best;
}

namespace {

// Threads share small maps with many hidden channels by groups of chunks instead of rows: no row is expanded twice, and
// every weight is read by one core alone. Each further group costs a pass over the output.
int64_t groups_of(const BlockShape& s, int64_t chunks) {
  const int64_t pixels = h_out(s) * w_out(s);
  if (pixels <= 400 && chunks >= 8) return 4;
  return pixels <= 100 && chunks >= 4 ? 2 : 1;
}

// How each image is cut: strips of output rows times column strips.
struct Tiling {
  int64_t strips, columns;
};

// Columns of the input that a column strip reads, and of its expanded row, zero columns included.
struct Widths {
  int64_t out, in, expanded;
};
Widths widths_of(const BlockShape& s, int64_t columns) {
  if (columns == 1) return {w_out(s), s.w, s.w + s.pad.left + s.pad.right};
  const int64_t out = divide_up(w_out(s), columns);
  const int64_t expanded = (out - 1) * s.stride + kernel_extent(s.kernel, s.dilation);
  return {out, std::min(s.w, expanded), expanded};
}

// Output rows that are filtered and projected at a time: as many as keep the ring, the row buffer and one panel of
// weights in the L1 cache, at least one. Each further row saves a pass over the chunk's weights.
int64_t rows_at_a_time(const BlockShape& s, const Machine& machine, const Widths& widths) {
  const Panels panels = panels_of(kChunk, machine.lanes);
  const int64_t weights = panels.vectors / panels.count * machine.lanes.lanes * kChunk * 4;
  const int64_t row = expanded_row(widths.expanded);
  const auto bytes = [&](int64_t rows) {
    const int64_t ring_rows = (rows - 1) * s.stride + kernel_extent(s.kernel, s.dilation);
    return 4 * (ring_rows * row + rows * widths.out * kChunk) + weights;
  };
  int64_t rows = 1;
  while (rows < h_out(s) && bytes(rows + 1) <= machine.l1) ++rows;
  return rows;
}

// Strips of whole rows. A strip's input and output are read once a chunk, so they should stay in the L2 cache.
int64_t strips_in_l2(const BlockShape& s, const Machine& machine, const DenseShape* stem) {
  const int64_t height = h_out(s);
  const int64_t in_row = stem ? stem->stride * stem->w * stem->c_in : s.w * s.c_in;
  const int64_t row_bytes = 4 * (s.stride * in_row + w_out(s) * s.c_out);
  const int64_t rows = std::clamp<int64_t>(machine.l2 / 2 / std::max<int64_t>(row_bytes, 1), 1, height);
  const int64_t least = 2 * rows_at_a_time(s, machine, widths_of(s, 1));
  return divide_up(height, std::max(rows, std::min(height, least)));
}

// Bytes that a tile may use before it waits for memory: the L2 cache and a core's share of the L3 cache.
int64_t cached_bytes(const Machine& machine) {
  return machine.l2 + std::min<int64_t>(4 * machine.l2, int64_t{4} << 20);
}

// Input rows or columns that `parts` parts expand together.
int64_t expanded_by(int64_t parts, const BlockShape& s, int64_t size) {
  return std::min(size * parts, size + (parts - 1) * halo(s));
}

// Most output rows of a tile whose input, output, ring and row buffer fit into `bytes`; 0 if those of one row do not.
int64_t rows_within(int64_t bytes, const BlockShape& s, int64_t columns) {
  const Widths widths = widths_of(s, columns);
  const int64_t extent = kernel_extent(s.kernel, s.dilation), in_row = widths.in * s.c_in;
  const int64_t ring = extent * expanded_row(widths.expanded) + widths.out * kChunk;
  const int64_t room = bytes / 4 - ring - halo(s) * in_row;
  return room < 0 ? 0 : room / (s.stride * in_row + widths.out * s.c_out);
}

// Time of a tiling in multiply-adds of one thread, threads without work included. A tile reads its input and output
// once a chunk: from the L2 cache for nothing, from the L3 cache for little, as they are read in order.
double tiling_cost(const BlockShape& s, const Machine& machine, const Tiling& t) {
  constexpr double kNear = 0.3, kFar = 2;  // multiply-adds in the time of a byte from the L3 cache and from memory
  const double in =
      static_cast<double>(expanded_by(t.strips, s, s.h)) * static_cast<double>(expanded_by(t.columns, s, s.w));
  const double out = static_cast<double>(h_out(s)) * static_cast<double>(w_out(s));
  const double c_in = static_cast<double>(s.c_in), c_out = static_cast<double>(s.c_out);
  double cost = in * (s.has_expand ? c_in : 1) + out * (static_cast<double>(s.kernel * s.kernel) + c_out);
  cost *= static_cast<double>(s.c_hidden);
  const int64_t rows = divide_up(h_out(s), t.strips);
  if (rows > rows_within(machine.l2, s, t.columns)) {
    const double bytes = 4 * static_cast<double>(divide_up(s.c_hidden, kChunk)) * (in * c_in + 2 * out * c_out);
    cost += bytes * (rows > rows_within(cached_bytes(machine), s, t.columns) ? kFar : kNear);
  }
  const int64_t tasks = std::max<int64_t>(s.n, 1) * t.strips * t.columns;
  return cost * static_cast<double>(divide_up(tasks, machine.threads) * machine.threads) / static_cast<double>(tasks);
}

// The tiling of the least cost. For each number of column strips: the fewest strips, of the two sizes of cache, that
// keep the threads busy.
Tiling cheapest_tiling(const BlockShape& s, const Machine& machine) {
  constexpr int64_t kLeastColumns = 8, kMostColumns = 256;  // output columns of a column strip; column strips
  const int64_t height = h_out(s), n = std::max<int64_t>(s.n, 1);
  Tiling best{1, 1};
  double least = tiling_cost(s, machine, best);
  for (int64_t columns = 1; columns <= std::clamp<int64_t>(w_out(s) / kLeastColumns, 1, kMostColumns); ++columns) {
    for (const int64_t bytes : {cached_bytes(machine), machine.l2}) {
      const int64_t rows = std::min(rows_within(bytes, s, columns), height), first = rows ? divide_up(height, rows) : 1;
      for (int64_t strips = first; strips <= height; ++strips) {
        if (strips > first && n * columns * strips > 16 * machine.threads) break;
        const double cost = tiling_cost(s, machine, {strips, columns});
        if (cost < least) best = {strips, columns}, least = cost;
      }
    }
  }
  return best;
}

// Strips of whole rows that stay in the L2 cache, unless too many rows are then computed twice. The rows between two
// strips grow with the dilation: such blocks are cut into fewer and more nearly square tiles.
Tiling tiling_of(const BlockShape& s, const Machine& machine, const DenseShape* stem) {
  constexpr double kWorthwhile = 1.0 / 16;
  Tiling strips{strips_in_l2(s, machine, stem), 1};
  Machine one = machine;
  one.threads = 1;
  // A stem reads whole rows of the image for every tile, so its columns are not cut.
  const bool cuts = !stem && (s.dilation > 1 || tiling_cost(s, one, cheapest_tiling(s, one)) <
                                                    (1 - kWorthwhile) * tiling_cost(s, one, strips));
  if (cuts) return cheapest_tiling(s, machine);
  const int64_t tasks = s.n * strips.strips;
  strips.strips *= parts_for_threads(tasks, machine.threads, divide_up(h_out(s), 2));
  strips.strips = std::min(h_out(s), strips.strips);
  return strips;
}

}  // namespace

BlockPlan plan_block(const BlockShape& s, DType dtype, const Machine& machine, const DenseShape* stem) {
  BlockPlan p{};
  const int64_t height = h_out(s), extent = kernel_extent(s.kernel, s.dilation);

  p.groups = groups_of(s, divide_up(s.c_hidden, kChunk));
  p.group_sets = parts_for_threads(s.n, machine.threads, p.groups);
  Tiling tiling{1, 1};
  if (p.groups == 1) {
    tiling = tiling_of(s, machine, stem);
  } else {
    const int64_t tasks = s.n * p.group_sets;
    tiling.strips = std::min(height, parts_for_threads(tasks, machine.threads, divide_up(height, 2)));
  }
  p.strips = tiling.strips;
  p.columns = tiling.columns;

  const Widths widths = widths_of(s, p.columns);
  const int64_t strip = divide_up(height, p.strips);
  p.rows = std::min(rows_at_a_time(s, machine, widths), strip);
  p.ring_rows = (p.rows - 1) * s.stride + extent;
  p.ring_row = expanded_row(widths.expanded);
  p.scratch = p.ring_rows * p.ring_row + p.ring_row + round_up(p.rows * widths.out * kChunk, kAlign);
  const int64_t in = std::min(s.h, (strip - 1) * s.stride + extent) * widths.in * s.c_in;
  const int64_t out = strip * (s.residual ? widths.in : widths.out) * s.c_out;
  p.scratch += stem ? stem_window(*stem) : round_up(widened(dtype, in), kAlign);
  if (p.group_sets == 1) {
    p.scratch += round_up(widened(dtype, out), kAlign);
    if (p.groups > 1) p.scratch += round_up(out, kAlign);
  }
  p.shared = p.group_sets > 1 ? s.n * p.groups * height * w_out(s) * s.c_out : 0;
  return p;
}

}  // namespace mnv2
