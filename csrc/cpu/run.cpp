#include "run.h"

#include <algorithm>

#ifdef MNV2_FUSED_X86_KERNELS
#include <immintrin.h>
#endif

#include "scratch.h"

namespace mnv2 {
namespace {

// Denormals cost up to a hundred times as much: they are flushed to zero while a task runs.
class FlushDenormals {
#ifdef MNV2_FUSED_X86_KERNELS
 public:
  FlushDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040u); }
  ~FlushDenormals() { _mm_setcsr(saved_); }
  FlushDenormals(const FlushDenormals&) = delete;
  FlushDenormals& operator=(const FlushDenormals&) = delete;

 private:
  unsigned saved_;
#endif
};

const void* offset(const void* p, DType dtype, int64_t elements) {
  return static_cast<const char*>(p) + elements * dtype_bytes(dtype);
}
void* offset(void* p, DType dtype, int64_t elements) { return static_cast<char*>(p) + elements * dtype_bytes(dtype); }

// Runs task(i) for each i in [0, count) with denormals flushed.
template <class Task>
void for_each(const ParallelFor& parallel, int64_t count, const Task& task) {
  parallel(count, [&](int64_t begin, int64_t end) {
    [[maybe_unused]] const FlushDenormals flush;
    for (int64_t i = begin; i < end; ++i) task(i);
  });
}

}  // namespace

void run_block(const KernelTable& kernels, const BlockPlan& plan, const BlockShape& s, DType dtype, const void* x,
               const float* packed, void* y, const ParallelFor& parallel) {
  if (s.n == 0) return;
  const int64_t in_image = s.h * s.w * s.c_in, out_image = h_out(s) * w_out(s) * s.c_out;
  float* partial = plan.shared ? scratch(ScratchUse::kShared, plan.shared) : nullptr;
  const int64_t parts = plan.strips * plan.group_sets;
  for_each(parallel, s.n * parts, [&](int64_t i) {
    const int64_t image = i / parts, strip = i % parts / plan.group_sets, set = i % plan.group_sets;
    BlockTask t{};
    t.shape = &s;
    t.plan = &plan;
    t.dtype = dtype;
    t.x = offset(x, dtype, image * in_image);
    t.y = offset(y, dtype, image * out_image);
    t.packed = packed;
    t.rows = part(h_out(s), plan.strips, strip);
    t.groups = part(plan.groups, plan.group_sets, set);
    t.partial = partial ? partial + image * plan.groups * out_image : nullptr;
    t.scratch = scratch(ScratchUse::kTask, plan.scratch);
    kernels.block(t);
  });
  if (!partial) return;
  const int64_t pixels = h_out(s) * w_out(s), pieces = std::min(pixels, plan.group_sets);
  for_each(parallel, s.n * pieces, [&](int64_t i) {
    const int64_t image = i / pieces;
    ReduceTask t{};
    t.shape = &s;
    t.plan = &plan;
    t.dtype = dtype;
    t.x = offset(x, dtype, image * in_image);
    t.y = offset(y, dtype, image * out_image);
    t.partial = partial + image * plan.groups * out_image;
    t.pixels = part(pixels, pieces, i % pieces);
    kernels.reduce(t);
  });
}

void run_stem(const KernelTable& kernels, const StemShape& s, DType dtype, const void* x, const int64_t (&strides)[4],
              const float* packed, void* y, int64_t threads, const ParallelFor& parallel) {
  if (s.n == 0) return;
  const int64_t strips = parts_for_threads(s.n, threads, h_out(s));
  for_each(parallel, s.n * strips, [&](int64_t i) {
    const int64_t image = i / strips;
    StemTask t{};
    t.shape = &s;
    t.dtype = dtype;
    t.x = offset(x, dtype, image * strides[0]);
    t.stride_channel = strides[1];
    t.stride_row = strides[2];
    t.stride_column = strides[3];
    t.y = offset(y, dtype, image * h_out(s) * w_out(s) * s.c_out);
    t.packed = packed;
    t.rows = part(h_out(s), strips, i % strips);
    t.scratch = scratch(ScratchUse::kTask, stem_scratch(s, dtype));
    kernels.stem(t);
  });
}

void run_head(const KernelTable& kernels, const HeadShape& s, DType dtype, const void* x, const float* packed, void* y,
              int64_t threads, const ParallelFor& parallel) {
  if (s.n == 0) return;
  const bool fp32 = dtype == DType::kFloat32;
  const Panels last = panels_of(s.c_last, kernels.lanes), classes = panels_of(s.classes, kernels.lanes);
  const int64_t pooled_row = last.vectors * last.lanes;
  float* pooled = scratch(ScratchUse::kShared, s.n * pooled_row);

  // A few images share one reading of a panel's weights.
  constexpr int64_t kImages = 4;
  const int64_t blocks = divide_up(s.n, kImages);
  const int64_t shares = std::min(last.count, parts_for_threads(blocks, threads, last.count));
  for_each(parallel, blocks * shares, [&](int64_t i) {
    PoolTask t{};
    t.shape = &s;
    t.dtype = dtype;
    t.x = x;
    t.packed = packed;
    t.pooled = pooled;
    t.pooled_row = pooled_row;
    t.images = {i / shares * kImages, std::min(s.n, (i / shares + 1) * kImages)};
    t.panels = part(last.count, shares, i % shares);
    t.scratch = fp32 ? nullptr : scratch(ScratchUse::kTask, s.h * s.w * s.c_in);
    kernels.pool(t);
  });

  const int64_t pieces = std::min(classes.count, 4 * threads);
  for_each(parallel, pieces, [&](int64_t i) {
    ClassifyTask t{};
    t.shape = &s;
    t.dtype = dtype;
    t.packed = packed;
    t.pooled = pooled;
    t.pooled_row = pooled_row;
    t.y = y;
    t.panels = part(classes.count, pieces, i);
    t.scratch = fp32 ? nullptr : scratch(ScratchUse::kTask, s.n * kernels.lanes.panel * kernels.lanes.lanes);
    kernels.classify(t);
  });
}

}  // namespace mnv2
