#include "passes.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "parts.h"
#include "scratch.h"

namespace mnv2 {
namespace {

constexpr int64_t kMapParts = 32;

// In how many parts to cut `pixels`, of at least `least` pixels each.
int64_t parts_of(int64_t pixels, int64_t least, int64_t most) {
  return std::clamp<int64_t>(pixels / least, 1, std::max<int64_t>(most, 1));
}

// The parts' sums, in scratch memory of the calling thread: fresh memory would fault in its pages at every call.
class Partial {
 public:
  Partial(int64_t doubles, int64_t floats)
      : doubles_(reinterpret_cast<double*>(scratch(ScratchUse::kShared, 2 * doubles + floats + 3 * kAlign))),
        floats_(reinterpret_cast<float*>(doubles_ + round_up(doubles, kAlign))) {}
  double* doubles(int64_t count) { return std::exchange(doubles_, doubles_ + count); }
  float* floats(int64_t count) { return std::exchange(floats_, floats_ + count); }

 private:
  double* doubles_;
  float* floats_;
};

}  // namespace

void Passes::moments(int64_t pixels, int64_t channels, const float* x, bool exact, double* mean,
                     double* products) const {
  const int64_t square = channels * channels;
  const int64_t parts = parts_of(pixels, kMomentsPixels, std::min(kMapParts, (int64_t{1} << 20) / square));
  Partial partial(parts * (channels + square), 0);
  double* const means = partial.doubles(parts * channels);
  double* const sums = partial.doubles(parts * square);
  const auto task = [&](int64_t i, float* scratch) {
    kernels.training.moments(
        {x, channels, part(pixels, parts, i), &means[i * channels], &sums[i * square], exact, scratch});
  };
  const auto merge = [&](int64_t row, float*) {
    for (int64_t j = row; j < channels; ++j) {
      double sum = sums[row * channels + j], mean_i = means[row], mean_j = means[j];
      for (int64_t i = 1; i < parts; ++i) {
        const Range range = part(pixels, parts, i);
        const double before = static_cast<double>(range.first), all = static_cast<double>(range.last);
        const double delta_i = means[i * channels + row] - mean_i, delta_j = means[i * channels + j] - mean_j;
        sum += sums[i * square + row * channels + j] + delta_i * delta_j * before * (all - before) / all;
        mean_i += delta_i * (all - before) / all;
        mean_j += delta_j * (all - before) / all;
      }
      products[row * channels + j] = products[j * channels + row] = sum;
      if (j == row) mean[row] = mean_i;
    }
  };
  run_stages({{parts, moments_scratch(channels, machine.lanes), task}, {channels, 0, merge}}, machine.threads,
             parallel);
}

void Passes::linear_moments(int64_t rows, int64_t channels, const float* weight, const double* mean,
                            const double* products, double* out_mean, double* out_squares, double* uncorrelated) const {
  const int64_t parts = parts_of(rows, 16, 4 * machine.threads);
  const auto task = [&](int64_t i, float*) {
    kernels.training.linear_moments(
        {weight, channels, part(rows, parts, i), mean, products, out_mean, out_squares, uncorrelated});
  };
  run_stages({{parts, 0, task}}, machine.threads, parallel);
}

void Passes::product(int64_t k, int64_t rows, int64_t columns, const float* a, const float* b, float* out) const {
  const int64_t row = round_up(columns, machine.lanes.lanes), parts = parts_of(rows, 16, 4 * machine.threads);
  Partial memory(0, (k + rows) * row);
  float* const padded = memory.floats(k * row);
  float* const sums = memory.floats(rows * row);
  for (int64_t i = 0; i < k; ++i)
    std::fill(std::copy_n(b + i * columns, columns, padded + i * row), padded + (i + 1) * row, 0.f);
  const auto task = [&](int64_t i, float*) {
    const Range range = part(rows, parts, i);
    kernels.training.product({k, rows, range, columns, row, a, padded, sums});
    for (int64_t r = range.first; r < range.last; ++r) std::copy_n(sums + r * row, columns, out + r * columns);
  };
  run_stages({{parts, 0, task}}, machine.threads, parallel);
}

void Passes::scale_rows(int64_t rows, int64_t columns, const float* a, const double* scale, float* out, const float* b,
                        double* sums) const {
  constexpr int64_t kChains = 8;
  const auto task = [&](int64_t row, float*) {
    const float factor = static_cast<float>(scale[row]);
    const float *row_a = a + row * columns, *row_b = b + row * columns;
    if (sums) {
      double chains[kChains] = {};
      int64_t i = 0;
      for (; i + kChains <= columns; i += kChains) {
        for (int64_t j = 0; j < kChains; ++j) {
          chains[j] += static_cast<double>(row_a[i + j]) * static_cast<double>(row_b[i + j]);
        }
      }
      for (; i < columns; ++i) chains[0] += static_cast<double>(row_a[i]) * static_cast<double>(row_b[i]);
      sums[row] = 0.;
      for (const double chain : chains) sums[row] += chain;
    }
    for (int64_t i = 0; i < columns; ++i) out[row * columns + i] = row_a[i] * factor;
  };
  run_stages({{rows, 0, task}}, machine.threads, parallel);
}

void Passes::map_moments(int64_t pixels, int64_t channels, const float* x, double* mean, double* squares) const {
  const int64_t parts = parts_of(pixels, kMapPixels, kMapParts);
  Partial partial(2 * parts * channels, 0);
  double* const means = partial.doubles(parts * channels);
  double* const sums = partial.doubles(parts * channels);
  const auto task = [&](int64_t i, float*) {
    MapTask t{};
    t.channels = channels;
    t.pixels = part(pixels, parts, i);
    t.a = x;
    t.sums[0] = &means[i * channels];
    t.sums[1] = &sums[i * channels];
    kernels.training.map_moments(t);
  };
  run_stages({{parts, 0, task}}, machine.threads, parallel);
  merge_moments(
      parts, channels, {0, channels}, means, sums, [&](int64_t i) { return part(pixels, parts, i).first; }, mean,
      squares);
}

void Passes::map_products(int64_t pixels, int64_t channels, const float* dy, const float* x, const float* mean,
                          double* sum_dy, double* sum_dy_centred) const {
  const int64_t parts = parts_of(pixels, kMapPixels, kMapParts);
  double* const sums = Partial(2 * parts * channels, 0).doubles(2 * parts * channels);
  const auto task = [&](int64_t i, float*) {
    MapTask t{};
    t.channels = channels;
    t.pixels = part(pixels, parts, i);
    t.a = dy;
    t.b = x;
    t.shift = mean;
    t.sums[0] = &sums[i * channels];
    t.sums[1] = &sums[(parts + i) * channels];
    kernels.training.map_products(t);
  };
  run_stages({{parts, 0, task}}, machine.threads, parallel);
  add_sums(&sums[0], parts, channels, {0, channels}, sum_dy);
  add_sums(&sums[parts * channels], parts, channels, {0, channels}, sum_dy_centred);
}

void Passes::map_combine(int64_t pixels, MapTask task) const {
  const int64_t parts = parts_of(pixels, kMapPixels, 4 * machine.threads);
  const auto run = [&](int64_t i, float*) {
    MapTask t = task;
    t.pixels = part(pixels, parts, i);
    kernels.training.map_combine(t);
  };
  run_stages({{parts, 0, run}}, machine.threads, parallel);
}

void Passes::input_backward(int64_t pixels, InputGradientTask task, const float* matrix, const double* vector) const {
  const int64_t c = task.channels, row = c + 1;
  const Panels panels = panels_of(c, machine.lanes);
  const int64_t size = panels.vectors * panels.lanes * row;
  float* const packed = Partial(0, size).floats(size);
  for (int64_t i = 0; i < panels.count; ++i) {
    const int64_t begin = panel_begin(panels, i) * panels.lanes, end = panel_begin(panels, i + 1) * panels.lanes;
    float* to = &packed[begin * row];
    for (int64_t k = 0; k < row; ++k) {
      for (int64_t j = begin; j < end; ++j) {
        *to++ = j >= c ? 0.f : k < c ? -matrix[k * c + j] : static_cast<float>(-vector[j]);
      }
    }
  }
  task.packed = packed;
  const int64_t parts = parts_of(pixels, kInputGradientPixels, 4 * machine.threads);
  const auto run = [&](int64_t i, float* scratch) {
    InputGradientTask t = task;
    t.pixels = part(pixels, parts, i);
    t.scratch = scratch;
    kernels.training.input_backward(t);
  };
  run_stages({{parts, input_gradient_scratch(c), run}}, machine.threads, parallel);
}

void Passes::windows(const DenseShape& s, const float* x, const int64_t strides[4], float* out) const {
  const int64_t height = h_out(s), width = w_out(s), run = s.kernel * s.c_in;
  const bool dense = strides[1] == 1 && strides[3] == s.c_in;  // a window's row is contiguous
  constexpr int64_t kColors3 = 9;  // floats in a window's row of three colors and three pixels
  const auto task = [&](int64_t i, float*) {
    const int64_t image = i / height, row = i % height;
    float* to = out + i * width * s.kernel * run;
    for (int64_t column = 0; column < width; ++column) {
      for (int64_t ky = 0; ky < s.kernel; ++ky) {
        const int64_t y = row * s.stride - s.pad.top + ky, left = column * s.stride - s.pad.left;
        if (dense && y >= 0 && y < s.h && left >= 0 && left + s.kernel <= s.w) {
          const float* from = x + image * strides[0] + y * strides[2] + left * strides[3];
          if (run == kColors3) {  // a constant size: copied without a call
            std::memcpy(to, from, kColors3 * sizeof(float));
          } else {
            std::copy_n(from, run, to);
          }
          to += run;
          continue;
        }
        for (int64_t kx = 0; kx < s.kernel; ++kx) {
          const int64_t at = left + kx;
          const bool inside = y >= 0 && y < s.h && at >= 0 && at < s.w;
          const float* from = x + image * strides[0] + (inside ? y * strides[2] + at * strides[3] : 0);
          for (int64_t c = 0; c < s.c_in; ++c) *to++ = inside ? from[c * strides[1]] : 0.f;
        }
      }
    }
  };
  run_stages({{s.n * height, 0, task}}, machine.threads, parallel);
}

namespace {

// Stores past the caches need whole cache lines.
bool aligned(const float* p) { return reinterpret_cast<uintptr_t>(p) % (kAlign * sizeof(float)) == 0; }

TrainPlan plan_of(const BlockShape& s, const Machine& machine, const TrainTask& task, bool both_ways = false) {
  TrainPlan plan = plan_train(s, machine, both_ways);
  plan.streams = plan.streams && aligned(task.hidden) && aligned(task.d_hidden);
  return plan;
}

// Runs `kernel` on every part and group of the plan.
Stage wide_stage(void (*kernel)(const TrainTask&), const BlockShape& s, const TrainPlan& plan, const TrainTask& task,
                 int64_t groups, const std::function<void(TrainTask&, int64_t part, int64_t group)>& fill) {
  const int64_t chunks = divide_up(s.c_hidden, kChunk);
  const auto run = [=, &s, &plan](int64_t i, float* scratch) {
    TrainTask t = task;
    t.shape = &s;
    t.plan = &plan;
    t.strips = part(s.n * plan.strips, plan.parts, i / groups);
    t.chunks = part(chunks, groups, i % groups);
    t.scratch = scratch;
    fill(t, i / groups, i % groups);
    kernel(t);
  };
  return {plan.parts * groups, plan.scratch, run};
}

}  // namespace

void Passes::hidden(const BlockShape& s, TrainTask task, double* mean, double* squares) const {
  const TrainPlan plan = plan_of(s, machine, task);
  const int64_t row = hidden_row(s), chunks = row / kChunk;
  double* const sums = Partial(2 * plan.parts * row, 0).doubles(2 * plan.parts * row);
  const Stage stage =
      wide_stage(kernels.training.hidden, s, plan, task, plan.groups, [&](TrainTask& t, int64_t i, int64_t) {
        t.mean_hidden = &sums[i * row];
        t.squares_hidden = &sums[(plan.parts + i) * row];
      });
  // The first pixel of part i. Parts begin at strips; the part after the last begins at the end.
  const auto begin = [&](int64_t i) {
    const int64_t strip = part(s.n * plan.strips, plan.parts, i).first;
    const int64_t rows = strip / plan.strips * h_out(s) + part(h_out(s), plan.strips, strip % plan.strips).first;
    return rows * w_out(s);
  };
  const auto merge = [&](int64_t chunk, float*) {
    const Range channels{chunk * kChunk, std::min((chunk + 1) * kChunk, s.c_hidden)};
    merge_moments(plan.parts, row, channels, sums, sums + plan.parts * row, begin, mean, squares);
  };
  run_stages({stage, {chunks, 0, merge}}, machine.threads, parallel);
}

void Passes::project(const BlockShape& s, TrainTask task) const {
  const TrainPlan plan = plan_of(s, machine, task);
  run_stages({wide_stage(kernels.training.project, s, plan, task, 1, [](TrainTask&, int64_t, int64_t) {})},
             machine.threads, parallel);
}

void Passes::project_backward(const BlockShape& s, TrainTask task, float* d_project_weight, double* sum_dy,
                              double* sum_dy_centred) const {
  const TrainPlan plan = plan_of(s, machine, task);
  const int64_t row = hidden_row(s), weights = row * s.c_out;
  const int64_t floats = d_project_weight ? plan.parts * weights : 0;
  Partial memory(2 * plan.parts * row, floats);
  double* const sums = memory.doubles(2 * plan.parts * row);
  float* const partial = memory.floats(floats);
  const Stage stage =
      wide_stage(kernels.training.project_backward, s, plan, task, plan.groups, [&](TrainTask& t, int64_t i, int64_t) {
        t.d_project_weight = d_project_weight ? &partial[i * weights] : nullptr;
        t.sum_dy = &sums[i * row];
        t.sum_dy_centred = &sums[(plan.parts + i) * row];
      });
  const auto add = [&](int64_t chunk, float*) {
    if (d_project_weight) add_parts(partial, plan.parts, weights, s, chunk, chunk, s.c_out, true, d_project_weight);
  };
  run_stages({stage, {row / kChunk, 0, add}}, machine.threads, parallel);
  const Range channels{0, s.c_hidden};
  add_sums(&sums[0], plan.parts, row, channels, sum_dy);
  add_sums(&sums[plan.parts * row], plan.parts, row, channels, sum_dy_centred);
}

void Passes::hidden_backward(const BlockShape& s, TrainTask task, const Gradients& g) const {
  const TrainPlan plan = plan_of(s, machine, task, s.has_expand && !task.d_hidden && !task.d_out);
  const int64_t row = hidden_row(s), taps = s.kernel * s.kernel, map = s.n * s.h * s.w * s.c_in;
  const int64_t groups = s.has_expand ? plan.groups : 1, all = plan.parts * row;
  const int64_t sizes[] = {g.d_depthwise_weight ? all * taps : 0, g.d_expand_weight ? all * s.c_in : 0,
                           g.d_project_weight ? all * s.c_out : 0, task.out ? (groups - 1) * map : 0};
  Partial memory((g.with_projection ? 4 : 2) * all, sizes[0] + sizes[1] + sizes[2] + sizes[3]);
  double* const sum_d_expand = memory.doubles(all);
  double* const sum_d_expand_linear = memory.doubles(all);
  double* const sum_dy = g.with_projection ? memory.doubles(all) : nullptr;
  double* const sum_dy_centred = g.with_projection ? memory.doubles(all) : nullptr;
  float* const d_depthwise_weight = memory.floats(sizes[0]);
  float* const d_expand_weight = memory.floats(sizes[1]);
  float* const d_project_weight = memory.floats(sizes[2]);
  float* const rest = memory.floats(sizes[3]);
  float* const out = task.out;
  const Stage stage =
      wide_stage(kernels.training.hidden_backward, s, plan, task, groups, [&](TrainTask& t, int64_t i, int64_t group) {
        t.d_depthwise_weight = g.d_depthwise_weight ? d_depthwise_weight + i * row * taps : nullptr;
        t.d_expand_weight = g.d_expand_weight ? d_expand_weight + i * row * s.c_in : nullptr;
        t.d_project_weight = g.d_project_weight ? d_project_weight + i * row * s.c_out : nullptr;
        t.sum_dy = sum_dy ? sum_dy + i * row : nullptr;
        t.sum_dy_centred = sum_dy_centred ? sum_dy_centred + i * row : nullptr;
        t.sum_d_expand = sum_d_expand + i * row;
        t.sum_d_expand_linear = sum_d_expand_linear + i * row;
        if (out) t.out = group == 0 ? out : &rest[(group - 1) * map];
      });
  const auto add = [&](int64_t chunk, float*) {
    if (g.d_depthwise_weight) {
      add_parts(d_depthwise_weight, plan.parts, row * taps, s, chunk, chunk, taps, false, g.d_depthwise_weight);
    }
    if (g.d_expand_weight) {
      add_parts(d_expand_weight, plan.parts, row * s.c_in, s, chunk, chunk, s.c_in, false, g.d_expand_weight);
    }
    if (g.d_project_weight) {
      add_parts(d_project_weight, plan.parts, row * s.c_out, s, chunk, chunk, s.c_out, true, g.d_project_weight);
    }
  };
  const int64_t pieces = out && groups > 1 ? s.n : 0;
  const auto add_groups = [&](int64_t i, float*) {
    const Range range = part(map, pieces, i);
    for (int64_t group = 0; group + 1 < groups; ++group) {
      for (int64_t j = range.first; j < range.last; ++j) out[j] += rest[group * map + j];
    }
  };
  run_stages({stage, {row / kChunk, 0, add}, {pieces, 0, add_groups}}, machine.threads, parallel);
  const Range channels{0, s.c_hidden};
  add_sums(sum_d_expand, plan.parts, row, channels, g.sum_d_expand);
  add_sums(sum_d_expand_linear, plan.parts, row, channels, g.sum_d_expand_linear);
  if (!g.with_projection) return;
  add_sums(sum_dy, plan.parts, row, channels, g.sum_dy);
  add_sums(sum_dy_centred, plan.parts, row, channels, g.sum_dy_centred);
}

}  // namespace mnv2
