#include "run.h"

#include <algorithm>

#include "../plan_cache.h"
#include "scratch.h"

namespace mnv2 {
namespace {

const void* offset(const void* p, DType dtype, int64_t elements) {
  return static_cast<const char*>(p) + elements * dtype_bytes(dtype);
}
void* offset(void* p, DType dtype, int64_t elements) { return static_cast<char*>(p) + elements * dtype_bytes(dtype); }

// What a block's plan is a function of.
struct BlockKey {
  BlockShape shape;
  DType dtype;
  Machine machine;

  bool operator==(const BlockKey&) const = default;
};

// The stem of a batch as the input of its stages.
struct StemSource {
  DenseShape shape;
  Images x;
  const float* packed;

  StemInput image(DType dtype, int64_t i) const {
    const auto& strides = x.strides;
    return {&shape, dtype, offset(x.data, dtype, i * strides[0]), strides[1], strides[2], strides[3], packed};
  }
};

// Collects the stages of units, then runs them. Shapes and plans are copied, data is not.
class Stages {
 public:
  Stages(const KernelTable& kernels, const Machine& machine, DType dtype)
      : kernels_(kernels), machine_(machine), dtype_(dtype) {}
  Stages(const Stages&) = delete;
  Stages& operator=(const Stages&) = delete;

  void run(const ParallelFor& parallel) const { run_stages(stages_, machine_.threads, parallel); }

  // `stem` makes the block's input where it is not null, and x is unused; `shared` holds plan.shared floats.
  void block(const BlockPlan& plan, const BlockShape& s, const void* x, const StemSource* stem, const float* packed,
             void* y, float* shared) {
    const int64_t in_image = s.h * s.w * s.c_in, out_image = h_out(s) * w_out(s) * s.c_out;
    const int64_t parts = plan.strips * plan.group_sets;
    float* partial = plan.shared ? shared : nullptr;
    const auto task = [=, this, source = stem ? *stem : StemSource{}, has_stem = stem != nullptr](int64_t i,
                                                                                                  float* scratch) {
      const int64_t image = i / parts, strip = i % parts / plan.group_sets, set = i % plan.group_sets;
      const StemInput input = has_stem ? source.image(dtype_, image) : StemInput{};
      BlockTask t{};
      t.shape = &s;
      t.plan = &plan;
      t.dtype = dtype_;
      t.x = has_stem ? nullptr : offset(x, dtype_, image * in_image);
      t.stem = has_stem ? &input : nullptr;
      t.y = offset(y, dtype_, image * out_image);
      t.packed = packed;
      t.rows = part(h_out(s), plan.strips, strip);
      t.groups = part(plan.groups, plan.group_sets, set);
      t.partial = partial ? partial + image * plan.groups * out_image : nullptr;
      t.scratch = scratch;
      kernels_.block(t);
    };
    stages_.push_back({s.n * parts, plan.scratch, task});
    if (!partial) return;
    const int64_t pixels = h_out(s) * w_out(s), pieces = std::min(pixels, plan.group_sets);
    const auto reduce = [=, this](int64_t i, float*) {
      const int64_t image = i / pieces;
      ReduceTask t{};
      t.shape = &s;
      t.plan = &plan;
      t.dtype = dtype_;
      t.x = offset(x, dtype_, image * in_image);
      t.y = offset(y, dtype_, image * out_image);
      t.partial = partial + image * plan.groups * out_image;
      t.pixels = part(pixels, pieces, i % pieces);
      kernels_.reduce(t);
    };
    stages_.push_back({s.n * pieces, 0, reduce});
  }

  void stem(const StemSource& source, void* y) {
    const DenseShape& s = source.shape;
    const int64_t strips = parts_for_threads(s.n, machine_.threads, h_out(s));
    const auto task = [=, this](int64_t i, float* scratch) {
      const int64_t image = i / strips;
      StemTask t{};
      t.in = source.image(dtype_, image);
      t.y = offset(y, dtype_, image * h_out(source.shape) * w_out(source.shape) * source.shape.c_out);
      t.rows = part(h_out(source.shape), strips, i % strips);
      t.scratch = scratch;
      kernels_.stem(t);
    };
    stages_.push_back({s.n * strips, stem_scratch(s, dtype_), task});
  }

  // `pooled`: n * pooled_row() floats.
  void head(const HeadShape& s, const void* x, const float* packed, void* y, float* pooled) {
    const bool fp32 = dtype_ == DType::kFloat32;
    const Panels last = panels_of(s.c_last, machine_.lanes), classes = panels_of(s.classes, machine_.lanes);
    const int64_t row = pooled_row(s, machine_.lanes);

    // A few images share one reading of a panel's weights.
    constexpr int64_t kImages = 4;
    const int64_t blocks = divide_up(s.n, kImages);
    const int64_t shares = std::min(last.count, parts_for_threads(blocks, machine_.threads, last.count));
    const auto pool = [=, this](int64_t i, float* scratch) {
      PoolTask t{};
      t.shape = &s;
      t.dtype = dtype_;
      t.x = x;
      t.packed = packed;
      t.pooled = pooled;
      t.pooled_row = row;
      t.images = {i / shares * kImages, std::min(s.n, (i / shares + 1) * kImages)};
      t.panels = part(last.count, shares, i % shares);
      t.scratch = scratch;
      kernels_.pool(t);
    };
    stages_.push_back({blocks * shares, fp32 ? 0 : kImages * s.h * s.w * s.c_in, pool});

    const int64_t pieces = std::min(classes.count, 4 * machine_.threads);
    const auto classify = [=, this](int64_t i, float* scratch) {
      ClassifyTask t{};
      t.shape = &s;
      t.dtype = dtype_;
      t.packed = packed;
      t.pooled = pooled;
      t.pooled_row = row;
      t.y = y;
      t.panels = part(classes.count, pieces, i);
      t.scratch = scratch;
      kernels_.classify(t);
    };
    stages_.push_back({pieces, fp32 ? 0 : s.n * machine_.lanes.panel * machine_.lanes.lanes, classify});
  }

 private:
  const KernelTable& kernels_;
  const Machine machine_;
  const DType dtype_;
  std::vector<Stage> stages_;
};

}  // namespace

void run_block(const KernelTable& kernels, const Machine& machine, const BlockShape& s, DType dtype, const void* x,
               const float* packed, void* y, const ParallelFor& parallel) {
  if (s.n == 0) return;
  static PlanCache<BlockKey, BlockPlan> plans(256);
  const std::shared_ptr<const BlockPlan> known =
      plans.get({s, dtype, machine}, [&] { return plan_block(s, dtype, machine); });
  const BlockPlan& plan = *known;
  float* shared = plan.shared ? scratch(ScratchUse::kShared, plan.shared) : nullptr;
  Stages stages(kernels, machine, dtype);
  stages.block(plan, s, x, nullptr, packed, y, shared);
  stages.run(parallel);
}

void run_stem(const KernelTable& kernels, const Machine& machine, const DenseShape& s, DType dtype, const Images& x,
              const float* packed, void* y, const ParallelFor& parallel) {
  if (s.n == 0) return;
  Stages stages(kernels, machine, dtype);
  stages.stem({s, x, packed}, y);
  stages.run(parallel);
}

void run_head(const KernelTable& kernels, const Machine& machine, const HeadShape& s, DType dtype, const void* x,
              const float* packed, void* y, const ParallelFor& parallel) {
  if (s.n == 0) return;
  Stages stages(kernels, machine, dtype);
  stages.head(s, x, packed, y, scratch(ScratchUse::kShared, s.n * pooled_row(s, machine.lanes)));
  stages.run(parallel);
}

void run_network(const KernelTable& kernels, const Machine& machine, const NetworkShape& s, const NetworkPlan& plan,
                 DType dtype, const Images& x, const float* packed, void* y, const ParallelFor& parallel) {
  if (s.stem.n == 0) return;
  char* arena = reinterpret_cast<char*>(scratch(ScratchUse::kShared, plan.arena));
  float* shared = reinterpret_cast<float*>(arena + plan.shared);
  Stages stages(kernels, machine, dtype);
  for (const Launch& l : plan.launches) {
    Images images = x;
    images.data = offset(x.data, dtype, l.first * x.strides[0]);
    const StemSource source{l.stem, images, packed + l.stem_weights};
    if (!l.has_block) {
      stages.stem(source, arena + l.out);
    } else {
      stages.block(l.plan, l.block, arena + l.in, l.has_stem ? &source : nullptr, packed + l.block_weights,
                   arena + l.out, shared);
    }
  }
  stages.head(s.head, arena + plan.head_in, packed + plan.head_weights, y, shared);
  stages.run(parallel);
}

}  // namespace mnv2
