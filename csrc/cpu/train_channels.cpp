// Training channel by channel. With the statistics of the batch, a hidden channel needs no other one until the
// projection: its expansion, both norms and their backward are made of its own pixels alone. So one chunk of channels
// of all images goes from the expansion to the depthwise outputs, and back, in memory that stays in the caches. The
// norms need neither moments of the input nor the closed form, and nothing wide is kept for the backward.
#include <algorithm>
#include <atomic>
#include <functional>
#include <vector>

#include "../introspect.h"
#include "parts.h"
#include "scratch.h"
#include "train_passes.h"

namespace mnv2 {
namespace {

using train::ConstData;
using train::Data;

std::atomic<int64_t> most_pixels{kChannelsPixels};

// What a chunk needs in memory: wide maps of the input's and the output's pixels, and each part's sums of weights.
struct ChunkMemory {
  float *expanded, *hidden, *d_hidden;
  float *d_project, *d_depthwise, *d_expand;
};

// Floats of these; zero for what the phases do not use. Sums are those of a part.
struct ChunkSizes {
  int64_t expanded, hidden;
  int64_t project, depthwise, expand;

  ChunkMemory in(float* memory, int64_t parts) const {
    const auto take = [&memory](int64_t size) { return (memory += size) - size; };
    ChunkMemory m{};
    m.expanded = take(expanded);
    m.hidden = take(hidden);
    m.d_hidden = take(hidden);
    m.d_project = take(parts * project);
    m.d_depthwise = take(parts * depthwise);
    m.d_expand = take(parts * expand);
    return m;
  }
  int64_t all(int64_t parts) const { return expanded + 2 * hidden + parts * (project + depthwise + expand); }
};

// A kernel over the parts of a chunk, and what joins its results.
struct Phase {
  void (*kernel)(const TrainTask&);
  std::function<void(TrainTask&, const ChunkMemory&, int64_t chunk, int64_t part)> fill;
  std::function<void(int64_t chunk, const ChunkMemory&)> join;  // or empty
};

// Three vectors over hidden channels in fp32, zero in the padding, which chunks fill one by one.
struct Vectors {
  float* values[3];

  void set(int64_t channel, double a, double b, double c) const {
    values[0][channel] = static_cast<float>(a);
    values[1][channel] = static_cast<float>(b);
    values[2][channel] = static_cast<float>(c);
  }
};

}  // namespace

// Runs phases over all chunks of a block.
class CpuPasses::Channels {
 public:
  // `depthwise`: the phases go beyond the expansion. `backward`: they form sums of weights.
  Channels(CpuPasses& passes, ConstData x, bool depthwise, bool backward)
      : task(passes.task_of(x)),
        training(passes.passes_.kernels.training),
        s(passes.block_),
        pixels_in(s.h * s.w),
        pixels_out(h_out(s) * w_out(s)),
        row(hidden_row(s)),
        plan(plan_channels(s, passes.passes_.machine)),
        wide_in(s.n * pixels_in * kChunk),
        wide_out(s.n * pixels_out * kChunk),
        sizes{wide_in, depthwise && backward ? wide_out : 0, backward ? s.c_out * kChunk : 0,
              backward ? s.kernel * s.kernel * kChunk : 0, backward ? s.c_in * kChunk : 0},
        passes_(passes),
        depthwise_(depthwise),
        expand_norm_(new_vectors()) {
    for (double*& sum : sums_) sum = passes.vector(plan.parts * row);
    task.shape = &s;
    task.plan = &plan;
    task.expand_scale = expand_norm_.values[0];
    task.expand_shift = expand_norm_.values[1];
    task.expand_mean = expand_norm_.values[2];
  }

  Vectors new_vectors() const {
    Vectors vectors{};
    for (float*& values : vectors.values) {
      values = reinterpret_cast<float*>(passes_.vector(divide_up(row, 2)));
      std::fill_n(values, row, 0.f);
    }
    return vectors;
  }

  void set_expand_norm(Range channels, const train::BatchNorm& norm) const {
    for (int64_t c = channels.first; c < channels.last; ++c) {
      expand_norm_.set(c, norm.scale[c], norm.shift[c], norm.mean[c]);
    }
  }

  Range channels(int64_t chunk) const { return {chunk * kChunk, std::min((chunk + 1) * kChunk, s.c_hidden)}; }
  double* sums(int64_t i, int64_t part) const { return sums_[i] + part * row; }

  // Runs `kernel`, which computes moments, and makes the norm of them.
  Phase moments(void (*kernel)(const TrainTask&), int64_t pixels, const train::Conv& conv, const train::BatchNorm& norm,
                const std::function<void(TrainTask&, int64_t chunk)>& fill) const {
    const auto join = [=, this, &conv, &norm](int64_t chunk, const ChunkMemory&) {
      const Range range = channels(chunk);
      const auto begin = [&](int64_t i) { return part(s.n, plan.parts, i).first * pixels; };
      const int64_t first = range.first, count = range.last - first;
      double mean[kChunk], squares[kChunk];
      merge_moments(plan.parts, row, {0, count}, sums_[0] + first, sums_[1] + first, begin, mean, squares);
      train::Conv own = conv;
      if (own.gamma) own.gamma += first;
      if (own.beta) own.beta += first;
      passes_.norm(own, count, mean, squares, static_cast<double>(s.n * pixels), norm.of(first));
      if (kernel == training.expand) set_expand_norm(range, norm);
    };
    return {kernel,
            [=, this](TrainTask& t, const ChunkMemory&, int64_t chunk, int64_t i) {
              t.mean_hidden = sums(0, i);
              t.squares_hidden = sums(1, i);
              fill(t, chunk);
            },
            join};
  }

  // The expansion again, for a backward.
  Phase expand_again() const {
    return {training.expand, [](TrainTask&, const ChunkMemory&, int64_t, int64_t) {}, nullptr};
  }

  // Adds up a chunk's sums of a norm's backward, and sets its factors.
  void join_sums(int64_t chunk, int64_t pixels, const train::BatchNorm& norm, const train::NormSums& to,
                 const Vectors& factors) const {
    const Range range = channels(chunk);
    add_sums(sums_[0], plan.parts, row, range, to.dy);
    add_sums(sums_[1], plan.parts, row, range, to.dy_centred);
    double memory[train::BatchNormBackward::kVectors];
    const train::BatchNormBackward one = train::BatchNormBackward::in(memory, 1);
    for (int64_t c = range.first; c < range.last; ++c) {
      train::set_backward(one, 0, norm.of(c), to.dy[c], to.dy_centred[c], static_cast<double>(s.n * pixels));
      factors.set(c, *one.d_output, *one.input, *one.constant);
    }
  }

  // Adds up a chunk's sums of weights, (parts, rows, kChunk); see add_parts().
  void join_weights(int64_t chunk, const float* partial, int64_t rows, bool transposed, Data out) const {
    if (out) add_parts(partial, plan.parts, rows * kChunk, s, 0, chunk, rows, transposed, floats(out));
  }

  // hidden_backward() that keeps the gradient of the expansion's norm, and linear_backward() behind it.
  void add_backward(std::vector<Phase>& phases, const train::BatchNorm& norm, const train::ChannelGradients& found,
                    const std::function<void(TrainTask&, const ChunkMemory&)>& fill) const {
    const Vectors factors = new_vectors();
    float* const d_expanded = d_expanded_of_all();
    phases.push_back({training.hidden_backward,
                      [=, this](TrainTask& t, const ChunkMemory& memory, int64_t chunk, int64_t i) {
                        t.d_expanded = d_expanded + chunk * wide_in;
                        t.sum_d_expand = sums(0, i);
                        t.sum_d_expand_linear = sums(1, i);
                        if (depthwise_) t.d_depthwise_weight = memory.d_depthwise + i * sizes.depthwise;
                        fill(t, memory);
                      },
                      [=, this, &norm](int64_t chunk, const ChunkMemory& memory) {
                        join_sums(chunk, pixels_in, norm, found.expand, factors);
                        join_weights(chunk, memory.d_depthwise, s.kernel * s.kernel, false, found.d_depthwise);
                      }});
    phases.push_back({training.linear_backward,
                      [=, this](TrainTask& t, const ChunkMemory& memory, int64_t chunk, int64_t i) {
                        t.d_expanded = d_expanded + chunk * wide_in;
                        std::copy_n(factors.values, 3, t.backward);
                        if (found.d_expand) t.d_expand_weight = memory.d_expand + i * sizes.expand;
                      },
                      [=, this](int64_t chunk, const ChunkMemory& memory) {
                        join_weights(chunk, memory.d_expand, s.c_in, false, found.d_expand);
                      }});
  }

  // The phases one after the other: of whole chunks, if these keep all threads busy; else of the parts of all chunks.
  // The bits are the same.
  void run(const std::vector<Phase>& phases) {
    constexpr int64_t kBusy = 4;  // threads, of which one may be idle
    const Machine& machine = passes_.passes_.machine;
    const int64_t chunks = row / kChunk, memory = round_up(sizes.all(plan.parts), kAlign);
    std::vector<Stage> stages;
    float* shared = nullptr;
    if (divide_up(chunks, machine.threads) * machine.threads * (kBusy - 1) <= chunks * kBusy) {
      const auto run_chunk = [&, this](int64_t chunk, float* scratch) {
        float* const of_chunk = scratch + round_up(plan.scratch, kAlign);
        for (const Phase& phase : phases) {
          for (int64_t i = 0; i < plan.parts; ++i) run_part(phase, chunk, i, scratch, of_chunk);
          if (phase.join) phase.join(chunk, sizes.in(of_chunk, plan.parts));
        }
      };
      stages.push_back({chunks, round_up(plan.scratch, kAlign) + memory, run_chunk});
    } else {
      shared = scratch(ScratchUse::kShared, chunks * memory);
      for (const Phase& phase : phases) {
        const auto run_one = [=, this, &phase](int64_t i, float* scratch) {
          const int64_t chunk = i / plan.parts;
          run_part(phase, chunk, i % plan.parts, scratch, shared + chunk * memory);
        };
        const auto join = [=, this, &phase](int64_t chunk, float*) {
          phase.join(chunk, sizes.in(shared + chunk * memory, plan.parts));
        };
        stages.push_back({chunks * plan.parts, plan.scratch, run_one});
        if (phase.join) stages.push_back({chunks, 0, join});
      }
    }
    run_stages(stages, machine.threads, passes_.parallel_);
  }

  // The gradient of x, of d_expanded of all chunks.
  void input_gradient(const train::ChannelGradients& found) const {
    if (!found.d_x) return;
    const Machine& machine = passes_.passes_.machine;
    TrainPlan by_pixels = plan;
    by_pixels.strips = std::min(s.h, divide_up(4 * machine.threads, s.n));
    TrainTask shared = task;
    shared.plan = &by_pixels;
    shared.expanded = nullptr;
    shared.d_expanded = d_expanded_of_all();
    shared.chunks = {0, row / kChunk};
    shared.out = floats(found.d_x);
    shared.residual = floats(found.residual);
    const auto run_part = [&](int64_t i, float*) {
      TrainTask t = shared;
      t.strips = {i, i + 1};
      training.input_gradient(t);
    };
    run_stages({{s.n * by_pixels.strips, 0, run_part}}, machine.threads, passes_.parallel_);
  }

  TrainTask task;  // what all tasks share
  const TrainingKernels& training;
  const BlockShape& s;
  const int64_t pixels_in, pixels_out;  // of an image
  const int64_t row;
  const TrainPlan plan;
  const int64_t wide_in, wide_out;  // floats in a chunk of a wide map
  const ChunkSizes sizes;

 private:
  float* d_expanded_of_all() const {
    return floats(passes_.workspace(train::Slot::kDHidden, passes_.expanded_size(s)));
  }

  void run_part(const Phase& phase, int64_t chunk, int64_t i, float* scratch, float* of_chunk) const {
    TrainTask t = task;
    const ChunkMemory memory = sizes.in(of_chunk, plan.parts);
    t.strips = part(s.n, plan.parts, i);
    t.chunks = {chunk, chunk + 1};
    t.first_chunk = chunk;
    t.scratch = scratch;
    t.expanded = task.expanded ? task.expanded + chunk * wide_in : memory.expanded;
    phase.fill(t, memory, chunk, i);
    phase.kernel(t);
  }

  CpuPasses& passes_;
  const bool depthwise_;
  const Vectors expand_norm_;
  double* sums_[2];
};

int64_t limit_channels(int64_t pixels) { return most_pixels.exchange(pixels); }

bool CpuPasses::by_channels(const BlockShape& s) const {
  return s.n * s.h * s.w <= std::min(most_pixels.load(), kChannelsPixelsEach * s.c_in);
}

int64_t CpuPasses::expanded_size(const BlockShape& s) const { return hidden_row(s) * s.n * s.h * s.w; }

void CpuPasses::hidden_by_channels(ConstData x, const train::Conv& expand, const train::Conv& depthwise, Data expanded,
                                   Data hidden, const train::BatchNorm& expand_norm,
                                   const train::BatchNorm& depthwise_norm) {
  Channels channels(*this, x, true, false);
  channels.task.expanded = floats(expanded);
  const TrainingKernels& training = channels.training;
  channels.run(
      {channels.moments(training.expand, channels.pixels_in, expand, expand_norm, [](TrainTask&, int64_t) {}),
       channels.moments(training.hidden, channels.pixels_out, depthwise, depthwise_norm,
                        [&](TrainTask& t, int64_t chunk) { t.hidden = floats(hidden) + chunk * channels.wide_out; })});
}

void CpuPasses::backward_by_channels(ConstData x, ConstData expanded, ConstData d_project,
                                     const train::BatchNorm& expand_norm, const train::BatchNorm& depthwise_norm,
                                     bool deeper, const train::ChannelGradients& found) {
  Channels channels(*this, x, true, true);
  channels.task.expanded = readable(expanded);
  channels.task.d_project = floats(d_project);
  set_norm(channels.task, depthwise_norm);
  const Vectors factors = channels.new_vectors();
  std::vector<Phase> phases;
  channels.set_expand_norm({0, block_.c_hidden}, expand_norm);
  if (!expanded) phases.push_back(channels.expand_again());
  phases.push_back({channels.training.project_backward,
                    [&](TrainTask& t, const ChunkMemory& memory, int64_t, int64_t i) {
                      t.hidden = memory.hidden;
                      t.d_hidden = memory.d_hidden;
                      t.sum_dy = channels.sums(0, i);
                      t.sum_dy_centred = channels.sums(1, i);
                      if (found.project.d_weight) t.d_project_weight = memory.d_project + i * channels.sizes.project;
                    },
                    [&](int64_t chunk, const ChunkMemory& memory) {
                      channels.join_sums(chunk, channels.pixels_out, depthwise_norm, found.project.sums, factors);
                      channels.join_weights(chunk, memory.d_project, block_.c_out, true, found.project.d_weight);
                    }});
  if (deeper) {
    channels.add_backward(phases, expand_norm, found, [&](TrainTask& t, const ChunkMemory& memory) {
      t.hidden = memory.hidden;
      t.d_hidden = memory.d_hidden;
      std::copy_n(factors.values, 3, t.backward);
    });
  }
  channels.run(phases);
  if (deeper) channels.input_gradient(found);
}

void CpuPasses::linear_by_channels(const BlockShape& s, ConstData x, ConstData weight, const train::Conv& conv,
                                   const train::BatchNorm& norm, Data y) {
  set_linear(s, weight, nullptr, nullptr);
  Channels channels(*this, x, false, false);
  Phase normalise{channels.training.normalise,
                  [&](TrainTask& t, const ChunkMemory&, int64_t, int64_t) { t.out = floats(y); }, nullptr};
  channels.run({channels.moments(channels.training.expand, channels.pixels_in, conv, norm, [](TrainTask&, int64_t) {}),
                normalise});
}

void CpuPasses::linear_backward_by_channels(const BlockShape& s, ConstData x, ConstData dy, ConstData weight,
                                            const train::BatchNorm& norm, const train::ChannelGradients& found) {
  set_linear(s, weight, nullptr, nullptr);
  Channels channels(*this, x, false, true);
  channels.set_expand_norm({0, s.c_hidden}, norm);
  std::vector<Phase> phases{channels.expand_again()};
  channels.add_backward(phases, norm, found, [&](TrainTask& t, const ChunkMemory&) { t.d_out = floats(dy); });
  channels.run(phases);
  channels.input_gradient(found);
}

}  // namespace mnv2
