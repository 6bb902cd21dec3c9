// Random shapes through every kernel table of this machine, in buffers of exactly the size that the interface promises,
// with tasks spread over threads: the sanitizers watch, a plain double-precision loop checks the values, and the plans
// for one thread and for several must agree to the bit.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "../../csrc/cpu/dispatch.h"
#include "../../csrc/cpu/kernels/simd/convert.h"
#include "../../csrc/cpu/pack.h"
#include "../../csrc/cpu/passes.h"
#include "../../csrc/cpu/run.h"

using namespace mnv2;

namespace {

std::mt19937 generator;

constexpr Activation kRelu6{0.f, 6.f};
constexpr Padding kOnePixel{1, 1, 1, 1};

int64_t pick(int64_t lo, int64_t hi) { return std::uniform_int_distribution<int64_t>(lo, hi)(generator); }
int64_t one_of(std::initializer_list<int64_t> values) { return values.begin()[pick(0, values.size() - 1)]; }

std::vector<float> values(int64_t count, double scale) {
  std::normal_distribution<float> normal(0.f, static_cast<float>(scale));
  std::vector<float> v(static_cast<size_t>(count));
  for (float& e : v) e = normal(generator);
  return v;
}

// Storage of an activation, exactly as long as it has to be.
struct Map {
  DType dtype;
  int64_t count;
  std::unique_ptr<char[]> data;

  Map(DType d, int64_t n) : dtype(d), count(n), data(new char[static_cast<size_t>(n * dtype_bytes(d))]) {}
  static Map random(DType dtype, int64_t count) {
    Map a(dtype, count);
    const std::vector<float> v = values(count, 1.0);
    if (dtype == DType::kFloat32) {
      std::memcpy(a.data.get(), v.data(), v.size() * 4);
    } else {
      narrow_each(dtype, v.data(), a.data.get(), count);
    }
    return a;
  }
  double at(int64_t i) const { return load_element(dtype, data.get(), i); }
  bool same(const Map& other) const {
    return std::memcmp(data.get(), other.data.get(), static_cast<size_t>(count * dtype_bytes(dtype))) == 0;
  }
};

ParallelFor threads_of(int64_t threads) {
  return [threads](int64_t count, const std::function<void(int64_t, int64_t)>& f) {
    std::vector<std::thread> pool;
    for (int64_t i = 0; i < std::min(threads, count); ++i) {
      const Range r = part(count, std::min(threads, count), i);
      pool.emplace_back([&f, r] { f(r.first, r.last); });
    }
    for (std::thread& t : pool) t.join();
  };
}

// What a parallel loop inside another one may do: the workers one after the other.
void one_after_the_other(int64_t count, const std::function<void(int64_t, int64_t)>& f) {
  for (int64_t i = 0; i < count; ++i) f(i, i + 1);
}

Machine several_threads(const KernelTable& table) {
  return {table.lanes, one_of({1 << 12, 1 << 15}), one_of({1 << 12, 1 << 15, 1 << 20}), pick(2, 5)};
}
Machine one_thread(const KernelTable& table) { return {table.lanes, 1 << 15, 1 << 20, 1}; }

double clip(double v, double lo, double hi) { return std::min(std::max(v, lo), hi); }

void expect_close(const char* what, const KernelTable& table, const Map& y, const std::vector<double>& expected) {
  double error = 0, scale = 1e-3;
  for (int64_t i = 0; i < y.count; ++i) {
    error = std::max(error, std::abs(y.at(i) - expected[static_cast<size_t>(i)]));
    scale = std::max(scale, std::abs(expected[static_cast<size_t>(i)]));
  }
  const double limit = y.dtype == DType::kFloat32 ? 1e-5 : y.dtype == DType::kFloat16 ? 2e-3 : 1e-2;
  if (!(error <= limit * scale)) {
    std::fprintf(stderr, "%s (%s): error %g at scale %g\n", what, table.name, error, scale);
    std::exit(1);
  }
}

void expect_same(const char* what, const KernelTable& table, const Map& a, const Map& b) {
  if (a.same(b)) return;
  std::fprintf(stderr, "%s (%s): the result depends on the number of threads\n", what, table.name);
  std::exit(1);
}

// A block of random shape; false where it breaks a rule.
bool random_shape(BlockShape& s) {
  s.n = pick(1, 3);
  s.h = pick(1, 24);
  s.w = pick(1, 24);
  s.kernel = one_of({1, 3, 3, 3, 3, 5, 7});
  s.stride = one_of({1, 1, 2, 2, 3});
  s.dilation = one_of({1, 1, 1, 2, 4});
  s.has_expand = pick(0, 3) > 0;
  s.c_in = pick(1, 70);
  s.c_hidden = s.has_expand ? pick(1, 400) : s.c_in;
  const int64_t most = kernel_extent(s.kernel, s.dilation);
  s.pad.top = pick(0, most), s.pad.left = pick(0, most), s.pad.bottom = pick(0, most), s.pad.right = pick(0, most);
  if (pick(0, 1)) s.pad.top = s.pad.left = s.pad.bottom = s.pad.right = (most - 1) / 2;
  s.residual = s.stride == 1 && h_out(s) == s.h && w_out(s) == s.w && pick(0, 2) > 0;
  s.c_out = s.residual ? s.c_in : pick(1, 70);
  s.act = {0.f, pick(0, 1) ? 6.f : INFINITY};
  return !broken_rule(s);
}

bool random_block(const KernelTable& table) {
  BlockShape s{};
  if (!random_shape(s)) return false;

  const auto expand = values(s.c_hidden * s.c_in, 1 / std::sqrt(s.c_in)), expand_bias = values(s.c_hidden, 1);
  const int64_t taps = s.kernel * s.kernel;
  const auto depthwise = values(s.c_hidden * taps, 1.0 / static_cast<double>(s.kernel));
  const auto depthwise_bias = values(s.c_hidden, 1);
  const auto project = values(s.c_out * s.c_hidden, 1 / std::sqrt(s.c_hidden)), project_bias = values(s.c_out, 1);
  const std::vector<double> shifts[] = {{expand_bias.begin(), expand_bias.end()},
                                        {depthwise_bias.begin(), depthwise_bias.end()},
                                        {project_bias.begin(), project_bias.end()}};
  const int64_t size = block_size(s, table.lanes);
  const std::unique_ptr<float[]> packed(new float[static_cast<size_t>(size)]);
  pack_block(s.c_in, s.c_hidden, s.c_out, s.kernel,
             {s.has_expand ? expand.data() : nullptr,
              depthwise.data(),
              project.data(),
              {nullptr, shifts[0].data()},
              {nullptr, shifts[1].data()},
              {nullptr, shifts[2].data()}},
             table.lanes, threads_of(3), packed.get());

  const DType dtype = static_cast<DType>(pick(0, 2));
  const Map x = Map::random(dtype, s.n * s.h * s.w * s.c_in);
  Map y(dtype, s.n * h_out(s) * w_out(s) * s.c_out), y1(dtype, y.count);
  const Machine several = several_threads(table);
  run_block(table, several, s, dtype, x.data.get(), packed.get(), y.data.get(), threads_of(several.threads));
  run_block(table, one_thread(table), s, dtype, x.data.get(), packed.get(), y1.data.get(), nullptr);
  expect_same("block", table, y, y1);

  std::vector<double> hidden(static_cast<size_t>(s.h * s.w * s.c_hidden)), filtered(static_cast<size_t>(s.c_hidden)),
      out;
  for (int64_t n = 0; n < s.n; ++n) {
    for (int64_t p = 0; p < s.h * s.w; ++p) {
      for (int64_t c = 0; c < s.c_hidden; ++c) {
        double sum = s.has_expand ? expand_bias[static_cast<size_t>(c)] : x.at((n * s.h * s.w + p) * s.c_in + c);
        for (int64_t k = 0; s.has_expand && k < s.c_in; ++k) {
          sum += expand[static_cast<size_t>(c * s.c_in + k)] * x.at((n * s.h * s.w + p) * s.c_in + k);
        }
        hidden[static_cast<size_t>(p * s.c_hidden + c)] = s.has_expand ? clip(sum, s.act.lo, s.act.hi) : sum;
      }
    }
    for (int64_t row = 0; row < h_out(s); ++row) {
      for (int64_t col = 0; col < w_out(s); ++col) {
        for (int64_t c = 0; c < s.c_hidden; ++c) {
          double sum = depthwise_bias[static_cast<size_t>(c)];
          for (int64_t tap = 0; tap < taps; ++tap) {
            const int64_t i = row * s.stride - s.pad.top + tap / s.kernel * s.dilation;
            const int64_t j = col * s.stride - s.pad.left + tap % s.kernel * s.dilation;
            if (i < 0 || j < 0 || i >= s.h || j >= s.w) continue;
            sum += depthwise[static_cast<size_t>(c * taps + tap)] *
                   hidden[static_cast<size_t>((i * s.w + j) * s.c_hidden + c)];
          }
          filtered[static_cast<size_t>(c)] = clip(sum, s.act.lo, s.act.hi);
        }
        for (int64_t o = 0; o < s.c_out; ++o) {
          double sum = project_bias[static_cast<size_t>(o)];
          for (int64_t c = 0; c < s.c_hidden; ++c) {
            sum += project[static_cast<size_t>(o * s.c_hidden + c)] * filtered[static_cast<size_t>(c)];
          }
          out.push_back(sum + (s.residual ? x.at(((n * s.h + row) * s.w + col) * s.c_in + o) : 0.0));
        }
      }
    }
  }
  expect_close("block", table, y, out);
  return true;
}

bool random_stem(const KernelTable& table) {
  DenseShape s{};
  s.n = pick(1, 3), s.h = pick(1, 40), s.w = pick(1, 40), s.c_in = pick(1, 5), s.c_out = pick(1, 60);
  s.kernel = one_of({1, 3, 3, 5}), s.stride = pick(1, 3);
  s.pad.top = pick(0, 3), s.pad.left = pick(0, 3), s.pad.bottom = pick(0, 3), s.pad.right = pick(0, 3);
  s.act = kRelu6;
  if (broken_rule(s)) return false;
  const int64_t taps = s.kernel * s.kernel;
  const auto weight = values(s.c_out * s.c_in * taps, 0.3), bias = values(s.c_out, 1);
  const std::unique_ptr<float[]> packed(
      new float[static_cast<size_t>(stem_size(s.c_in, s.c_out, s.kernel, table.lanes))]);
  pack_stem(s.c_in, s.c_out, s.kernel, weight.data(), bias.data(), table.lanes, packed.get());
  const DType dtype = static_cast<DType>(pick(0, 2));
  const Map x = Map::random(dtype, s.n * s.h * s.w * s.c_in);
  const bool channels_last = pick(0, 1);
  const int64_t image = s.h * s.w * s.c_in;
  const int64_t last[4] = {image, 1, s.w * s.c_in, s.c_in}, first[4] = {image, s.h * s.w, s.w, 1};
  const int64_t (&strides)[4] = channels_last ? last : first;
  Map y(dtype, s.n * h_out(s) * w_out(s) * s.c_out), y1(dtype, y.count);
  const Images images{x.data.get(), {strides[0], strides[1], strides[2], strides[3]}};
  const Machine several = several_threads(table);
  run_stem(table, several, s, dtype, images, packed.get(), y.data.get(), threads_of(several.threads));
  run_stem(table, one_thread(table), s, dtype, images, packed.get(), y1.data.get(), nullptr);
  expect_same("stem", table, y, y1);

  std::vector<double> out;
  for (int64_t n = 0; n < s.n; ++n) {
    for (int64_t row = 0; row < h_out(s); ++row) {
      for (int64_t col = 0; col < w_out(s); ++col) {
        for (int64_t o = 0; o < s.c_out; ++o) {
          double sum = bias[static_cast<size_t>(o)];
          for (int64_t tap = 0; tap < taps; ++tap) {
            const int64_t i = row * s.stride - s.pad.top + tap / s.kernel,
                          j = col * s.stride - s.pad.left + tap % s.kernel;
            if (i < 0 || j < 0 || i >= s.h || j >= s.w) continue;
            for (int64_t c = 0; c < s.c_in; ++c) {
              sum += weight[static_cast<size_t>((o * s.c_in + c) * taps + tap)] *
                     x.at(n * strides[0] + c * strides[1] + i * strides[2] + j * strides[3]);
            }
          }
          out.push_back(clip(sum, s.act.lo, s.act.hi));
        }
      }
    }
  }
  expect_close("stem", table, y, out);
  return true;
}

bool random_head(const KernelTable& table) {
  const HeadShape s{.n = pick(1, 9),
                    .h = pick(1, 8),
                    .w = pick(1, 8),
                    .c_in = pick(1, 60),
                    .c_last = pick(1, 200),
                    .classes = pick(1, 150),
                    .act = kRelu6};
  const auto conv = values(s.c_last * s.c_in, 1 / std::sqrt(s.c_in)), conv_bias = values(s.c_last, 1);
  const auto classifier = values(s.classes * s.c_last, 1 / std::sqrt(s.c_last)), classifier_bias = values(s.classes, 1);
  const std::unique_ptr<float[]> packed(
      new float[static_cast<size_t>(head_size(s.c_in, s.c_last, s.classes, table.lanes))]);
  pack_head(s.c_in, s.c_last, s.classes, conv.data(), conv_bias.data(), classifier.data(), classifier_bias.data(),
            table.lanes, packed.get());
  const DType dtype = static_cast<DType>(pick(0, 2));
  const int64_t pixels = s.h * s.w;
  const Map x = Map::random(dtype, s.n * pixels * s.c_in);
  Map y(dtype, s.n * s.classes), y1(dtype, y.count);
  const Machine several = several_threads(table);
  run_head(table, several, s, dtype, x.data.get(), packed.get(), y.data.get(), threads_of(several.threads));
  run_head(table, one_thread(table), s, dtype, x.data.get(), packed.get(), y1.data.get(), nullptr);
  expect_same("head", table, y, y1);

  std::vector<double> out;
  for (int64_t n = 0; n < s.n; ++n) {
    std::vector<double> pooled(static_cast<size_t>(s.c_last));
    for (int64_t p = 0; p < pixels; ++p) {
      for (int64_t c = 0; c < s.c_last; ++c) {
        double sum = conv_bias[static_cast<size_t>(c)];
        for (int64_t k = 0; k < s.c_in; ++k) {
          sum += conv[static_cast<size_t>(c * s.c_in + k)] * x.at((n * pixels + p) * s.c_in + k);
        }
        pooled[static_cast<size_t>(c)] += clip(sum, s.act.lo, s.act.hi) / static_cast<double>(pixels);
      }
    }
    for (int64_t o = 0; o < s.classes; ++o) {
      double sum = classifier_bias[static_cast<size_t>(o)];
      for (int64_t c = 0; c < s.c_last; ++c) {
        sum += classifier[static_cast<size_t>(o * s.c_last + c)] * pooled[static_cast<size_t>(c)];
      }
      out.push_back(sum);
    }
  }
  expect_close("head", table, y, out);
  return true;
}

// The network against its units one after the other, which the functions above have checked.
bool random_network(const KernelTable& table) {
  NetworkShape s{};
  const int64_t n = pick(1, 12), channels = one_of({8, 20, 32, 60});
  s.stem = dense_of_weights(3, channels, 3);
  s.stem.n = n, s.stem.h = pick(8, 20), s.stem.w = pick(8, 20), s.stem.stride = pick(1, 2);
  s.stem.pad = kOnePixel, s.stem.act = kRelu6;
  int64_t h = h_out(s.stem), w = w_out(s.stem), c = channels;
  for (int64_t i = pick(0, 3); i > 0; --i) {
    BlockShape b = block_of_weights(c, c, pick(4, 60), 3, pick(0, 1) == 1);
    b.n = n, b.h = h, b.w = w, b.stride = pick(1, 2);
    b.pad = kOnePixel, b.act = kRelu6;
    if (b.has_expand) b.c_hidden = c * pick(2, 6);
    if (b.stride == 1 && pick(0, 1)) b.c_out = c, b.residual = true;
    s.blocks.push_back(b);
    h = h_out(b), w = w_out(b), c = b.c_out;
  }
  s.head = head_of_weights(c, pick(1, 100), pick(1, 60));
  s.head.n = n, s.head.h = h, s.head.w = w, s.head.act = kRelu6;

  // Any numbers are weights, so long as they are small.
  const std::vector<float> weights = values(network_size(s, table.lanes), 0.1);
  const std::unique_ptr<float[]> packed(new float[weights.size()]);
  std::copy(weights.begin(), weights.end(), packed.get());
  const DType dtype = static_cast<DType>(pick(0, 2));
  const int64_t image = s.stem.h * s.stem.w * 3;
  const Map x = Map::random(dtype, n * image);
  const Images images{x.data.get(), {image, 1, s.stem.w * 3, 3}};
  Map y(dtype, n * s.head.classes), y1(dtype, y.count);
  const Machine several = several_threads(table), one = one_thread(table);
  const auto plan = [&](const Machine& machine) { return plan_network(s, dtype, machine); };
  run_network(table, several, s, plan(several), dtype, images, packed.get(), y.data.get(), threads_of(several.threads));
  run_network(table, several, s, plan(several), dtype, images, packed.get(), y1.data.get(), one_after_the_other);
  expect_same("network with workers one after the other", table, y, y1);
  run_network(table, one, s, plan(one), dtype, images, packed.get(), y1.data.get(), nullptr);
  expect_same("network", table, y, y1);
  if (dtype != DType::kFloat32) return true;  // a fused stem's output is not rounded

  Map map(dtype, n * h_out(s.stem) * w_out(s.stem) * channels);
  const float* unit = packed.get();
  run_stem(table, one, s.stem, dtype, images, unit, map.data.get(), nullptr);
  unit += stem_size(3, channels, 3, table.lanes);
  for (const BlockShape& b : s.blocks) {
    Map next(dtype, n * h_out(b) * w_out(b) * b.c_out);
    run_block(table, one, b, dtype, map.data.get(), unit, next.data.get(), nullptr);
    unit += block_size(b, table.lanes);
    map = std::move(next);
  }
  run_head(table, one, s.head, dtype, map.data.get(), unit, y1.data.get(), nullptr);
  expect_same("network and its units", table, y, y1);
  return true;
}

// What the training passes make of a block; exactly as large as they have to be.
struct Trained {
  Map hidden, gradient, z, dx, project, depthwise, expand;
  std::vector<double> sums;

  static Map floats(int64_t count) { return Map(DType::kFloat32, count); }
  explicit Trained(const BlockShape& s)
      : hidden(floats(round_up(s.c_hidden, kChunk) * s.n * h_out(s) * w_out(s))),
        gradient(floats(hidden.count)),
        z(floats(s.n * h_out(s) * w_out(s) * s.c_out)),
        dx(floats(s.n * s.h * s.w * s.c_in)),
        project(floats(s.c_out * s.c_hidden)),
        depthwise(floats(s.c_hidden * s.kernel * s.kernel)),
        expand(floats(s.c_hidden * s.c_in)),
        sums(static_cast<size_t>(5 * s.c_hidden)) {}
};

// The passes one after the other; `keep`: wide maps are kept between them.
void train(const Passes& passes, const BlockShape& s, TrainTask task, bool keep, Trained& t) {
  const auto sums = [&](int64_t i) { return &t.sums[static_cast<size_t>(i * s.c_hidden)]; };
  const auto data = [](Map& a) { return reinterpret_cast<float*>(a.data.get()); };
  TrainTask pass = task;
  pass.hidden = data(t.hidden);
  passes.hidden(s, pass, sums(0), sums(1));
  pass.out = data(t.z);
  passes.project(s, pass);
  std::fill_n(pass.hidden, t.hidden.count, NAN);
  task.z_gradient = pass.out;
  if (keep) task.hidden = pass.hidden, task.hidden_gradient = data(t.gradient);
  passes.project_backward(s, task, data(t.project), sums(2), sums(3));
  task.out = data(t.dx);
  Passes::Gradients gradients{};
  gradients.depthwise = data(t.depthwise);
  gradients.expand = s.has_expand ? data(t.expand) : nullptr;
  gradients.first = sums(4);
  passes.hidden_backward(s, task, gradients);
  if (keep) return;
  // In one pass. Its sums are formed strip by strip of the input instead, so they may round differently.
  Trained one(s);
  gradients.project = data(one.project);
  gradients.of_gradient = one.sums.data();
  gradients.of_product = one.sums.data() + s.c_hidden;
  gradients.with_projection = true;
  task.out = data(one.dx);
  passes.hidden_backward(s, task, gradients);
  expect_same("one pass", passes.kernels, t.dx, one.dx);
  std::vector<double> expected;
  for (int64_t i = 0; i < t.project.count; ++i) expected.push_back(t.project.at(i));
  expect_close("one pass", passes.kernels, one.project, expected);
}

// Kept or made again, on one thread or on several: the same bits. The tests in Python look at the numbers.
bool random_training(const KernelTable& table) {
  BlockShape s{};
  if (!random_shape(s)) return false;
  s.residual = false;
  const int64_t taps = s.kernel * s.kernel, row = round_up(s.c_hidden, kChunk);
  const auto expand = values(s.c_hidden * s.c_in, 1 / std::sqrt(s.c_in));
  const auto depthwise = values(s.c_hidden * taps, 1.0 / static_cast<double>(s.kernel));
  const auto project = values(s.c_out * s.c_hidden, 1 / std::sqrt(s.c_hidden));
  const auto second = values(6 * row, 1);
  BlockWeights weights{};
  if (s.has_expand) weights.expand = expand.data();
  weights.depthwise = depthwise.data();
  weights.project = project.data();
  const auto size = [&](const BlockShape& b) { return static_cast<size_t>(block_size(b, table.lanes)); };
  const std::unique_ptr<float[]> forward(new float[size(s)]), backward(new float[size(backward_shape(s))]);
  pack_block(s.c_in, s.c_hidden, s.c_out, s.kernel, weights, table.lanes, threads_of(2), forward.get());
  pack_backward(s.c_in, s.c_hidden, s.c_out, s.kernel, weights, table.lanes, threads_of(2), backward.get());
  const Map x = Map::random(DType::kFloat32, s.n * s.h * s.w * s.c_in);
  TrainTask task{};
  task.x = reinterpret_cast<const float*>(x.data.get());
  task.packed = forward.get();
  task.packed_backward = backward.get();
  task.scale = &second[0];
  task.shift = &second[static_cast<size_t>(row)];
  task.mean = &second[static_cast<size_t>(2 * row)];
  for (int i = 0; i < 3; ++i) task.backward[i] = &second[static_cast<size_t>((3 + i) * row)];

  const Machine several = several_threads(table);
  Machine one = several;
  one.threads = 1;
  const ParallelFor threads = threads_of(several.threads), alone = one_after_the_other;
  Trained a(s), b(s), c(s);
  train({table, several, threads}, s, task, true, a);
  train({table, one, alone}, s, task, true, b);
  train({table, several, threads}, s, task, false, c);
  for (const Trained* other : {&b, &c}) {
    const char* what = other == &b ? "training on one thread" : "training that keeps nothing";
    expect_same(what, table, a.z, other->z);
    expect_same(what, table, a.dx, other->dx);
    expect_same(what, table, a.project, other->project);
    expect_same(what, table, a.depthwise, other->depthwise);
    if (s.has_expand) expect_same(what, table, a.expand, other->expand);
    if (std::memcmp(a.sums.data(), other->sums.data(), a.sums.size() * sizeof(double)) != 0) {
      std::fprintf(stderr, "%s (%s): other sums\n", what, table.name);
      std::exit(1);
    }
  }
  return true;
}

// The passes over narrow maps: in buffers of exact size, the same bits on one thread and on several.
bool random_maps(const KernelTable& table) {
  const int64_t pixels = pick(1, 3000), c = pick(1, 70), rows = pick(1, 40);
  const Map x = Map::random(DType::kFloat32, pixels * c), g = Map::random(DType::kFloat32, x.count);
  const auto weight = values(rows * c, 1), matrix = values(c * c, 1), vectors = values(4 * c, 1);
  const std::vector<double> vector = std::vector<double>(vectors.begin(), vectors.begin() + c);
  const float* const of_x = reinterpret_cast<const float*>(x.data.get());
  const float* const of_g = reinterpret_cast<const float*>(g.data.get());
  const Machine several = several_threads(table), one = one_thread(table);
  const ParallelFor threads = threads_of(several.threads), alone = one_after_the_other;
  std::vector<double> results[2];
  std::vector<float> maps[2];
  for (int i = 0; i < 2; ++i) {
    const Passes passes{table, i ? one : several, i ? alone : threads};
    std::vector<double> mean(static_cast<size_t>(c)), products(static_cast<size_t>(c * c)),
        sums(static_cast<size_t>(2 * c)), linear(static_cast<size_t>(2 * rows));
    std::vector<float> out(static_cast<size_t>(x.count)), squares(static_cast<size_t>(c * c));
    passes.moments(pixels, c, of_x, mean.data(), products.data());
    passes.linear_moments(rows, c, weight.data(), mean.data(), products.data(), linear.data(), linear.data() + rows);
    std::vector<float> scaled(weight.size());
    passes.scale_rows(rows, c, weight.data(), linear.data(), scaled.data(), weight.data(), linear.data() + rows);
    passes.product(rows, c, c, weight.data(), scaled.data(), squares.data());
    passes.map_products(pixels, c, of_x, of_g, vectors.data(), sums.data(), sums.data() + c);
    for (const auto* v : {&mean, &products, &linear, &sums}) results[i].insert(results[i].end(), v->begin(), v->end());
    passes.map_moments(pixels, c, of_x, sums.data(), sums.data() + c);
    results[i].insert(results[i].end(), sums.begin(), sums.end());
    MapTask combine{};
    combine.channels = c;
    combine.a = of_x, combine.b = of_g, combine.c = of_g;
    combine.scale[0] = vectors.data(), combine.scale[1] = vectors.data() + c, combine.shift = vectors.data() + 2 * c;
    combine.out = out.data();
    passes.map_combine(pixels, combine);
    InputGradientTask input{};
    input.channels = c;
    input.a = out.data(), input.x = of_x, input.residual = of_g, input.out = out.data();
    passes.input_backward(pixels, input, matrix.data(), vector.data());
    maps[i] = out;
    maps[i].insert(maps[i].end(), squares.begin(), squares.end());
  }
  const bool same = std::memcmp(results[0].data(), results[1].data(), results[0].size() * sizeof(double)) == 0;
  if (!same || std::memcmp(maps[0].data(), maps[1].data(), maps[0].size() * sizeof(float)) != 0) {
    std::fprintf(stderr, "maps (%s): the result depends on the number of threads\n", table.name);
    std::exit(1);
  }
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 40;
  for (const KernelTable* table : supported_kernels()) {
    generator.seed(1);
    int blocks = 0, stems = 0, heads = 0, networks = 0;
    for (int i = 0; i < rounds; ++i) blocks += random_block(*table);
    for (int i = 0; i < rounds; ++i) stems += random_stem(*table);
    for (int i = 0; i < rounds / 2; ++i) heads += random_head(*table);
    for (int i = 0; i < rounds / 2; ++i) networks += random_network(*table);
    int trained = 0, maps = 0;
    for (int i = 0; i < rounds; ++i) trained += random_training(*table);
    for (int i = 0; i < rounds / 2; ++i) maps += random_maps(*table);
    std::printf("%s: %d blocks, %d stems, %d heads, %d networks, %d blocks in training, %d maps\n", table->name, blocks,
                stems, heads, networks, trained, maps);
    if (!blocks || !stems || !heads || !networks || !trained || !maps) return 1;
  }
  return 0;
}
