#include "run.h"

#include <algorithm>
#include <chrono>

#include "../plan_cache.h"
#include "crowding.h"
#include "scratch.h"

namespace mnv2 {
namespace {

// A block's plan follows from these.
struct BlockKey {
  BlockShape shape;
  DType dtype;
  Machine machine;

  bool operator==(const BlockKey&) const = default;
};

// The stem of a batch as the input of its stages.
struct StemBatch {
  DenseShape shape;
  Source x;
  int64_t strides[4];
  const void* packed;
  const float* image_bias;  // of the first image, or null

  StemInput image(int64_t i) const {
    return {.shape = &shape,
            .x = at(x, i * strides[0]),
            .stride_channel = strides[1],
            .stride_row = strides[2],
            .stride_column = strides[3],
            .packed = packed,
            .bias = image_bias ? image_bias + i * image_bias_row(shape) : nullptr};
  }
};

// `first`: the batch's first image among those of x.
StemBatch stem_batch(const DenseShape& s, DType dtype, const Images& x, int64_t first, const void* packed,
                     const float* image_bias = nullptr) {
  const auto& strides = x.strides;
  return {.shape = s,
          .x = at(Source{x.data, dtype}, first * strides[0]),
          .strides = {strides[0], strides[1], strides[2], strides[3]},
          .packed = packed,
          .image_bias = image_bias};
}

// Collects the stages of units, then runs them. Shapes and plans must outlive the run; no data is copied.
class Stages {
 public:
  Stages(const InferenceKernels& kernels, const Machine& machine) : kernels_(kernels), machine_(machine) {}
  Stages(const Stages&) = delete;
  Stages& operator=(const Stages&) = delete;

  void run(const ParallelFor& parallel) const {
    const auto start = std::chrono::steady_clock::now();
    const auto worked = run_stages(stages_, crowded() ? 1 : machine_.threads, parallel);
    if (worked.count() > 0) parallel_loop_took(std::chrono::steady_clock::now() - start, worked);
  }

  // `stem` computes the block's input unless it is null, and x is unused; `shared` holds plan.shared floats.
  void block(const BlockPlan& plan, const BlockShape& s, Source x, const StemBatch* stem, const void* packed, Sink y,
             float* shared) {
    const int64_t in_image = s.h * s.w * s.c_in, out_image = h_out(s) * w_out(s) * s.c_out;
    const int64_t tiles = plan.strips * plan.columns, parts = tiles * plan.group_sets;
    float* partial = plan.shared ? shared : nullptr;
    const auto task = [=, this, &plan, &s, batch = stem ? *stem : StemBatch{}, has_stem = stem != nullptr](
                          int64_t i, float* scratch) {
      const int64_t image = i / parts, tile = i % parts / plan.group_sets, set = i % plan.group_sets;
      const StemInput input = has_stem ? batch.image(image) : StemInput{};
      kernels_.block({.shape = &s,
                      .plan = &plan,
                      .x = has_stem ? Source{} : at(x, image * in_image),
                      .stem = has_stem ? &input : nullptr,
                      .y = at(y, image * out_image),
                      .packed = packed,
                      .rows = part(h_out(s), plan.strips, tile / plan.columns),
                      .columns = part(w_out(s), plan.columns, tile % plan.columns),
                      .groups = part(plan.groups, plan.group_sets, set),
                      .partial = partial ? partial + image * plan.groups * out_image : nullptr,
                      .scratch = scratch});
    };
    stages_.push_back({s.n * parts, plan.scratch, task});
    if (!partial) return;
    const int64_t pixels = h_out(s) * w_out(s), pieces = std::min(pixels, plan.group_sets);
    const auto reduce = [=, this, &plan, &s](int64_t i, float*) {
      const int64_t image = i / pieces;
      kernels_.reduce({.shape = &s,
                       .plan = &plan,
                       .x = at(x, image * in_image),
                       .y = at(y, image * out_image),
                       .partial = partial + image * plan.groups * out_image,
                       .pixels = part(pixels, pieces, i % pieces)});
    };
    stages_.push_back({s.n * pieces, 0, reduce});
  }

  void stem(const StemBatch& batch, Sink y) {
    const DenseShape& s = batch.shape;
    const int64_t strips = parts_for_threads(s.n, machine_.threads, h_out(s));
    const auto task = [=, this](int64_t i, float* scratch) {
      const DenseShape& shape = batch.shape;  // of the copy
      const int64_t image = i / strips;
      kernels_.stem({.in = batch.image(image),
                     .y = at(y, image * h_out(shape) * w_out(shape) * shape.c_out),
                     .rows = part(h_out(shape), strips, i % strips),
                     .scratch = scratch});
    };
    stages_.push_back({s.n * strips, stem_scratch(s, y.dtype), task});
  }

  // `pooled`: n * pooled_row() floats.
  void head(const HeadShape& s, Source x, const void* packed, Sink y, float* pooled) {
    const Panels last = panels_of(s.c_last, machine_.lanes), classes = panels_of(s.classes, machine_.lanes);
    const int64_t row = pooled_row(s, machine_.lanes);

    // A few images share one reading of a panel's weights.
    constexpr int64_t kImages = 4;
    const int64_t blocks = divide_up(s.n, kImages);
    const int64_t shares = std::min(last.count, parts_for_threads(blocks, machine_.threads, last.count));
    const auto pool = [=, this, &s](int64_t i, float* scratch) {
      kernels_.pool({.shape = &s,
                     .x = x,
                     .packed = packed,
                     .pooled = pooled,
                     .pooled_row = row,
                     .images = {i / shares * kImages, std::min(s.n, (i / shares + 1) * kImages)},
                     .panels = part(last.count, shares, i % shares),
                     .scratch = scratch});
    };
    stages_.push_back({blocks * shares, widened(x.dtype, kImages * s.h * s.w * s.c_in), pool});

    const int64_t pieces = std::min(classes.count, 4 * machine_.threads);
    const auto classify = [=, this, &s](int64_t i, float* scratch) {
      kernels_.classify({.shape = &s,
                         .packed = packed,
                         .pooled = pooled,
                         .pooled_row = row,
                         .y = y,
                         .panels = part(classes.count, pieces, i),
                         .scratch = scratch});
    };
    stages_.push_back({pieces, widened(y.dtype, s.n * machine_.lanes.panel * machine_.lanes.lanes), classify});
  }

 private:
  const InferenceKernels& kernels_;
  const Machine machine_;
  std::vector<Stage> stages_;
};

const void* bytes_from(const void* packed, int64_t bytes) { return static_cast<const char*>(packed) + bytes; }

}  // namespace

void run_block(const KernelTable& kernels, const Machine& machine, const BlockShape& s, DType dtype, const void* x,
               const void* packed, void* y, const ParallelFor& parallel) {
  if (s.n == 0) return;
  static PlanCache<BlockKey, BlockPlan> plans(256);
  const std::shared_ptr<const BlockPlan> known =
      plans.get({s, dtype, machine}, [&] { return plan_block(s, dtype, machine); });
  const BlockPlan& plan = *known;
  float* shared = plan.shared ? scratch(ScratchUse::kShared, plan.shared) : nullptr;
  Stages stages(kernels.floats, machine);
  stages.block(plan, s, {x, dtype}, nullptr, packed, {y, dtype}, shared);
  stages.run(parallel);
}

void run_stem(const KernelTable& kernels, const Machine& machine, const DenseShape& s, DType dtype, const Images& x,
              const void* packed, const float* image_bias, void* y, const ParallelFor& parallel) {
  if (s.n == 0) return;
  Stages stages(kernels.floats, machine);
  stages.stem(stem_batch(s, dtype, x, 0, packed, image_bias), {y, dtype});
  stages.run(parallel);
}

void run_head(const KernelTable& kernels, const Machine& machine, const HeadShape& s, DType dtype, const void* x,
              const void* packed, void* y, const ParallelFor& parallel) {
  if (s.n == 0) return;
  Stages stages(kernels.floats, machine);
  float* pooled = scratch(ScratchUse::kShared, s.n * pooled_row(s, machine.lanes));
  stages.head(s, {x, dtype}, packed, {y, dtype}, pooled);
  stages.run(parallel);
}

void run_network(const KernelTable& kernels, const Machine& machine, const NetworkShape& s, const NetworkPlan& plan,
                 DType dtype, const Images& x, const void* packed, void* const* outputs, const ParallelFor& parallel) {
  if (s.images.n == 0) return;
  char* const arena = reinterpret_cast<char*>(scratch(ScratchUse::kShared, plan.arena));
  float* const shared = reinterpret_cast<float*>(arena + plan.shared);
  const auto map = [&](const MapPlace& place) {
    return (place.output < 0 ? arena : static_cast<char*>(outputs[place.output])) + place.offset;
  };
  Stages stages(kernels.floats, machine);
  for (const Launch& l : plan.launches) {
    const Source in{l.source == kImages ? nullptr : map(l.in), dtype};
    const Sink out{map(l.out), dtype};
    StemBatch dense{};
    if (l.has_dense) {
      const Images images = l.source == kImages ? x : dense_images(l.dense, in.data);
      const int64_t first = l.source == kImages ? l.first : 0;
      dense = stem_batch(l.dense, dtype, images, first, bytes_from(packed, l.dense_weights));
    }
    if (l.has_block) {
      stages.block(l.plan, l.block, in, l.has_dense ? &dense : nullptr, bytes_from(packed, l.weights), out, shared);
    } else if (l.has_head) {
      stages.head(l.head, in, bytes_from(packed, l.weights), out, shared);
    } else {
      stages.stem(dense, out);
    }
  }
  stages.run(parallel);
}

}  // namespace mnv2
