#include "train_plan.h"

#include <algorithm>

namespace mnv2 {
namespace {

constexpr int64_t kParts = 32;    // most parts: keeps that many threads busy
constexpr int64_t kPixels = 112;  // pixels at a time, about: enough to pay for reading a sum and writing it again
constexpr int64_t kLeast = 32;    // pixels in a part, about: each part has sums of its own, as large as the weights
constexpr int64_t kChannelParts = 8;
constexpr int64_t kStreamed = 8;  // times the L2 cache: a larger map has left all caches before it is read

// For the largest strip: the output rows that its input rows touch, and the input rows that these read.
struct StripRows {
  int64_t output, input;
};
StripRows strip_rows(const BlockShape& s, int64_t strips) {
  StripRows rows{0, 0};
  for (int64_t i = 0; i < strips; ++i) {
    const Range touched = output_rows(s, part(s.h, strips, i)), own = part(h_out(s), strips, i);
    const Range all{std::min(touched.first, own.first), std::max(touched.last, own.last)}, read = input_rows(s, all);
    rows.output = std::max(rows.output, all.last - all.first);
    rows.input = std::max(rows.input, read.last - read.first);
  }
  return rows;
}

}  // namespace

TrainPlan plan_train(const BlockShape& s, const Machine& machine, bool both_ways) {
  TrainPlan p{};
  const int64_t height = h_out(s), width = w_out(s), extent = kernel_extent(s.kernel, s.dilation);
  const int64_t chunks = divide_up(s.c_hidden, kChunk);

  // A strip's narrow maps are read once a chunk, so they should stay in the L2 cache.
  const int64_t image = 4 * (s.h * s.w * s.c_in + height * width * s.c_out);
  p.strips = std::clamp<int64_t>(divide_up(image, machine.l2 / 2), 1, std::min(s.h, height));
  p.ring_row = expanded_row(s);
  const StripRows rows = strip_rows(s, p.strips);
  const int64_t strips = s.n * p.strips;
  p.groups = chunks >= 8 && s.h * s.w <= 400 ? 4 : 1;
  p.parts = std::clamp<int64_t>(s.n * height * width / kLeast, 1, std::min(strips, kParts / p.groups));
  // For small images with many chunks, the chunk's weights and sums stay in the cache instead.
  p.chunk_by_chunk = p.strips == 1 && image * divide_up(strips, std::max<int64_t>(p.parts, 1)) <= machine.l2 / 2;

  p.streams = s.n * height * width * chunks * kChunk * 4 > kStreamed * machine.l2;

  p.rows = std::clamp<int64_t>(kPixels / width, 1, height);
  p.input_rows = std::clamp<int64_t>(kPixels / s.w, 1, s.h);
  p.ring_rows = both_ways ? std::max<int64_t>(rows.input, 1) : (p.rows - 1) * s.stride + extent;
  p.gradient_rows = std::min(height, p.input_rows + extent);
  p.gradient_row = (width + 2 * kGradientColumns) * kChunk;

  p.tile = round_up(std::max(p.rows * width, p.input_rows * s.w) * kChunk, kAlign);
  p.strip = round_up(rows.output * width * kChunk, kAlign);
  p.scratch = (p.ring_rows + 1) * p.ring_row + (p.gradient_rows + 1) * p.gradient_row + 3 * p.tile + 2 * p.strip +
              s.kernel * s.kernel * kChunk;
  return p;
}

TrainPlan plan_channels(const BlockShape& s, const Machine& machine) {
  TrainPlan p = plan_train(s, machine, false);
  p.strips = 1;
  p.parts = std::min(s.n, kChannelParts);
  p.streams = false;
  return p;
}

}  // namespace mnv2
