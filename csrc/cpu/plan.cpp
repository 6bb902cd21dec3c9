#include "plan.h"

#include <algorithm>

namespace mnv2 {

#ifdef MNV2_FORCE
int64_t force_rows, force_strips, force_columns;
#endif

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
// every weight is read by one core alone. Four groups: each further one costs a pass over the output.
int64_t groups_of(const BlockShape& s, int64_t chunks) {
  if (h_out(s) * w_out(s) > 400) return 1;
  return chunks >= 8 ? 4 : 1;
}

}  // namespace

BlockPlan plan_block(const BlockShape& s, DType dtype, const Machine& machine, const DenseShape* stem) {
  BlockPlan p{};
  const int64_t height = h_out(s), width = w_out(s);
  const int64_t extent = kernel_extent(s.kernel, s.dilation);
  const Panels panels = panels_of(kChunk, machine.lanes);

  p.columns = 1;
#ifdef MNV2_FORCE
  if (force_columns) p.columns = force_columns;
#endif
  const int64_t columns = divide_up(width, p.columns);
  const int64_t in_columns =
      p.columns == 1 ? s.w : std::min(s.w, (columns - 1) * s.stride + extent);
  p.ring_row = p.columns == 1 ? expanded_row(s) : expanded_row((columns - 1) * s.stride + extent);

  // Rows at a time: as many as keep the ring, the row buffer and one panel of weights in the L1 cache, at least one.
  // Each further row saves a pass over the chunk's weights.
  const int64_t weights = panels.vectors / panels.count * machine.lanes.lanes * kChunk * 4;
  const auto bytes = [&](int64_t rows) {
    return 4 * (((rows - 1) * s.stride + extent) * p.ring_row + rows * columns * kChunk) + weights;
  };
  p.rows = 1;
  while (p.rows < height && bytes(p.rows + 1) <= machine.l1) ++p.rows;

  // Strips: the strip's input and output are read once a chunk, so they should stay in the L2 cache.
  const int64_t in_row = stem ? stem->stride * stem->w * stem->c_in : s.w * s.c_in;
  const int64_t row_bytes = 4 * (s.stride * in_row + width * s.c_out);
  const int64_t strip_rows = std::clamp<int64_t>(machine.l2 / 2 / std::max<int64_t>(row_bytes, 1), 1, height);
  p.groups = groups_of(s, divide_up(s.c_hidden, kChunk));
  p.strips = divide_up(height, std::max(strip_rows, std::min<int64_t>(height, 2 * p.rows)));
  if (p.groups > 1) p.strips = 1;
  p.group_sets = parts_for_threads(s.n, machine.threads, p.groups);
  const int64_t tasks = s.n * p.strips * p.group_sets;
  p.strips = std::min(height, p.strips * parts_for_threads(tasks, machine.threads, divide_up(height, 2)));

#ifdef MNV2_FORCE
  if (force_strips) p.strips = force_strips;
  if (force_rows) p.rows = force_rows;
#endif
  const int64_t strip = divide_up(height, p.strips);
  p.rows = std::min(p.rows, strip);
  p.ring_rows = (p.rows - 1) * s.stride + extent;
  p.scratch = p.ring_rows * p.ring_row + p.ring_row + round_up(p.rows * columns * kChunk, kAlign);
  const int64_t in = std::min(s.h, (strip - 1) * s.stride + extent) * in_columns * s.c_in;
  const int64_t out = strip * (s.residual ? in_columns : columns) * s.c_out;
  p.scratch += stem ? stem_window(*stem) : round_up(widened(dtype, in), kAlign);
  if (p.group_sets == 1) {
    p.scratch += round_up(widened(dtype, out), kAlign);
    if (p.groups > 1) p.scratch += round_up(out, kAlign);
  }
  p.shared = p.group_sets > 1 ? s.n * p.groups * height * width * s.c_out : 0;
  return p;
}

}  // namespace mnv2
