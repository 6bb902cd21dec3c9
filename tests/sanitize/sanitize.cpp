// Runs random shapes through every kernel table of this machine, with tasks spread over threads. Buffers have exactly
// the size that the interface asks for, so that the sanitizers see any overrun. A plain double-precision loop checks
// the values. The plans for one thread and for several must give the same bits.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "../../csrc/cpu/crowding.h"
#include "../../csrc/cpu/dispatch.h"
#include "../../csrc/cpu/kernels/simd/convert.h"
#include "../../csrc/cpu/pack.h"
#include "../../csrc/cpu/passes.h"
#include "../../csrc/cpu/run.h"
#include "../../csrc/cpu/train_passes.h"

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

// An activation, in memory of exactly its size.
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

// A ParallelFor without threads: a loop inside another parallel loop may run like this.
void one_after_the_other(int64_t count, const std::function<void(int64_t, int64_t)>& f) {
  for (int64_t i = 0; i < count; ++i) f(i, i + 1);
}

Machine several_threads(const KernelTable& table) {
  return {.lanes = table.lanes,
          .l1 = one_of({1 << 12, 1 << 15}),
          .l2 = one_of({1 << 12, 1 << 14, 1 << 15, 1 << 20}),
          .threads = pick(2, 5)};
}
Machine one_thread(const KernelTable& table) {
  return {.lanes = table.lanes, .l1 = 1 << 15, .l2 = 1 << 20, .threads = 1};
}

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

int cut_blocks = 0;  // whose columns were cut

// A block of random shape; false if it breaks a rule.
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
  if (pick(0, 2) == 0) s.out = kRelu6;
  return !broken_rule(s);
}

// Convolutions of a block and their biases.
struct BlockFloats {
  std::vector<float> expand, expand_bias, depthwise, depthwise_bias, project, project_bias;

  explicit BlockFloats(const BlockShape& s)
      : expand(values(s.c_hidden * s.c_in, 1 / std::sqrt(s.c_in))),
        expand_bias(values(s.c_hidden, 1)),
        depthwise(values(s.c_hidden * s.kernel * s.kernel, 1.0 / static_cast<double>(s.kernel))),
        depthwise_bias(values(s.c_hidden, 1)),
        project(values(s.c_out * s.c_hidden, 1 / std::sqrt(s.c_hidden))),
        project_bias(values(s.c_out, 1)) {}
};

std::unique_ptr<float[]> packed_block(const KernelTable& table, const BlockShape& s, const BlockFloats& w) {
  const std::vector<double> expand_bias(w.expand_bias.begin(), w.expand_bias.end());
  const std::vector<double> depthwise_bias(w.depthwise_bias.begin(), w.depthwise_bias.end());
  const std::vector<double> project_bias(w.project_bias.begin(), w.project_bias.end());
  std::unique_ptr<float[]> packed(new float[static_cast<size_t>(block_size(s, table.lanes))]);
  const BlockWeights weights{.expand = s.has_expand ? w.expand.data() : nullptr,
                             .depthwise = w.depthwise.data(),
                             .project = w.project.data(),
                             .expand_norm = {.scale = nullptr, .shift = expand_bias.data()},
                             .depthwise_norm = {.scale = nullptr, .shift = depthwise_bias.data()},
                             .project_norm = {.scale = nullptr, .shift = project_bias.data()}};
  pack_block(s.c_in, s.c_hidden, s.c_out, s.kernel, weights, table.lanes, threads_of(3), packed.get());
  return packed;
}

// The depthwise convolution's input for image n: (h, w, c_hidden).
std::vector<double> expected_hidden(const BlockShape& s, const BlockFloats& w, const Map& x, int64_t n) {
  std::vector<double> hidden;
  for (int64_t p = n * s.h * s.w; p < (n + 1) * s.h * s.w; ++p) {
    for (int64_t c = 0; c < s.c_hidden; ++c) {
      if (!s.has_expand) {
        hidden.push_back(x.at(p * s.c_in + c));
        continue;
      }
      double sum = w.expand_bias[static_cast<size_t>(c)];
      for (int64_t k = 0; k < s.c_in; ++k) sum += w.expand[static_cast<size_t>(c * s.c_in + k)] * x.at(p * s.c_in + k);
      hidden.push_back(clip(sum, s.act.lo, s.act.hi));
    }
  }
  return hidden;
}

double expected_depthwise(const BlockShape& s, const BlockFloats& w, const std::vector<double>& hidden, int64_t row,
                          int64_t col, int64_t c) {
  const int64_t taps = s.kernel * s.kernel;
  double sum = w.depthwise_bias[static_cast<size_t>(c)];
  for (int64_t tap = 0; tap < taps; ++tap) {
    const int64_t i = row * s.stride - s.pad.top + tap / s.kernel * s.dilation;
    const int64_t j = col * s.stride - s.pad.left + tap % s.kernel * s.dilation;
    if (i < 0 || j < 0 || i >= s.h || j >= s.w) continue;
    sum +=
        w.depthwise[static_cast<size_t>(c * taps + tap)] * hidden[static_cast<size_t>((i * s.w + j) * s.c_hidden + c)];
  }
  return clip(sum, s.act.lo, s.act.hi);
}

std::vector<double> expected_block(const BlockShape& s, const BlockFloats& w, const Map& x) {
  std::vector<double> out, filtered(static_cast<size_t>(s.c_hidden));
  for (int64_t n = 0; n < s.n; ++n) {
    const std::vector<double> hidden = expected_hidden(s, w, x, n);
    for (int64_t pixel = 0; pixel < h_out(s) * w_out(s); ++pixel) {
      const int64_t row = pixel / w_out(s), col = pixel % w_out(s);
      for (int64_t c = 0; c < s.c_hidden; ++c) {
        filtered[static_cast<size_t>(c)] = expected_depthwise(s, w, hidden, row, col, c);
      }
      for (int64_t o = 0; o < s.c_out; ++o) {
        double sum = w.project_bias[static_cast<size_t>(o)];
        for (int64_t c = 0; c < s.c_hidden; ++c) {
          sum += w.project[static_cast<size_t>(o * s.c_hidden + c)] * filtered[static_cast<size_t>(c)];
        }
        sum = clip(sum, s.out.lo, s.out.hi);
        out.push_back(sum + (s.residual ? x.at(((n * s.h + row) * s.w + col) * s.c_in + o) : 0.0));
      }
    }
  }
  return out;
}

bool random_block(const KernelTable& table) {
  BlockShape s{};
  if (!random_shape(s)) return false;
  if (pick(0, 1)) s.w += pick(20, 60);  // wide enough for column strips
  const BlockFloats weights(s);
  const std::unique_ptr<float[]> packed = packed_block(table, s, weights);
  const DType dtype = static_cast<DType>(pick(0, 2));
  const Map x = Map::random(dtype, s.n * s.h * s.w * s.c_in);
  Map y(dtype, s.n * h_out(s) * w_out(s) * s.c_out), y1(dtype, y.count);
  const Machine several = several_threads(table);
  cut_blocks += plan_block(s, dtype, several).columns > 1;
  run_block(table, several, s, dtype, x.data.get(), packed.get(), y.data.get(), threads_of(several.threads));
  run_block(table, one_thread(table), s, dtype, x.data.get(), packed.get(), y1.data.get(), nullptr);
  expect_same("block", table, y, y1);
  expect_close("block", table, y, expected_block(s, weights, x));
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
  const bool has_image_bias = pick(0, 2) == 0;
  const auto image_bias = values(s.n * image_bias_row(s), 1);
  const float* biases = has_image_bias ? image_bias.data() : nullptr;
  run_stem(table, several, s, dtype, images, packed.get(), biases, y.data.get(), threads_of(several.threads));
  run_stem(table, one_thread(table), s, dtype, images, packed.get(), biases, y1.data.get(), nullptr);
  expect_same("stem", table, y, y1);

  std::vector<double> out;
  for (int64_t n = 0; n < s.n; ++n) {
    for (int64_t row = 0; row < h_out(s); ++row) {
      for (int64_t col = 0; col < w_out(s); ++col) {
        for (int64_t o = 0; o < s.c_out; ++o) {
          double sum = biases ? biases[n * image_bias_row(s) + o] : bias[static_cast<size_t>(o)];
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

// A network of random units, each of which reads any map before it. Every map is read, or is an output.
NetworkShape random_units() {
  NetworkShape s{};
  const int64_t n = pick(1, 12);
  s.images = {n, pick(8, 20), pick(8, 20), 3};
  NetworkUnit stem{};
  stem.source = kImages, stem.dense = dense_of_weights(3, one_of({8, 20, 32, 60}), 3);
  stem.dense.n = n, stem.dense.h = s.images.h, stem.dense.w = s.images.w, stem.dense.stride = pick(1, 2);
  stem.dense.pad = kOnePixel, stem.dense.act = kRelu6;
  s.units.push_back(stem);
  for (int64_t i = pick(0, 5); i > 0; --i) {
    const auto last = static_cast<int64_t>(s.units.size()) - 1;
    NetworkUnit unit{};
    unit.source = pick(0, 3) ? last : pick(0, last);
    const ImageSize in = output_of(s.units[static_cast<size_t>(unit.source)]);
    if (pick(0, 3) == 0) {
      unit.kind = UnitKind::kDense;
      DenseShape& d = unit.dense = dense_of_weights(in.c, pick(4, 60), 1);
      d.n = n, d.h = in.h, d.w = in.w, d.act = kRelu6;
    } else {
      unit.kind = UnitKind::kBlock;
      BlockShape& b = unit.block = block_of_weights(in.c, in.c, pick(4, 60), 3, pick(0, 1) == 1);
      b.n = n, b.h = in.h, b.w = in.w, b.stride = pick(1, 2), b.pad = kOnePixel, b.act = kRelu6;
      if (b.has_expand) b.c_hidden = in.c * pick(2, 6);
      if (b.stride == 1 && pick(0, 1)) b.c_out = in.c, b.residual = true;
      if (pick(0, 1)) b.out = kRelu6;
    }
    s.units.push_back(unit);
  }
  const ImageSize in = output_of(s.units.back());
  NetworkUnit head{};
  head.kind = UnitKind::kHead, head.tap = true, head.source = static_cast<int64_t>(s.units.size()) - 1;
  head.head = head_of_weights(in.c, pick(1, 100), pick(1, 60));
  head.head.n = n, head.head.h = in.h, head.head.w = in.w, head.head.act = kRelu6;
  s.units.push_back(head);
  for (int64_t i = 0; i + 1 < static_cast<int64_t>(s.units.size()); ++i)
    s.units[static_cast<size_t>(i)].tap = last_reader(s, i) == i || pick(0, 3) == 0;
  return s;
}

// Checks a network against its units, run one after the other. The functions above check the units.
bool random_network(const KernelTable& table) {
  const NetworkShape s = random_units();
  const int64_t n = s.images.n;

  // Any small numbers will do as packed weights.
  const std::vector<float> weights = values(network_size(s, table.lanes), 0.1);
  const std::unique_ptr<float[]> packed(new float[weights.size()]);
  std::copy(weights.begin(), weights.end(), packed.get());
  const DType dtype = static_cast<DType>(pick(0, 2));
  const int64_t image = s.images.h * s.images.w * 3;
  const Map x = Map::random(dtype, n * image);
  const Images images{x.data.get(), {image, 1, s.images.w * 3, 3}};
  const auto new_map = [&](const NetworkUnit& unit) {
    const ImageSize size = output_of(unit);
    return Map(dtype, size.n * size.h * size.w * size.c);
  };
  struct Outputs {
    std::vector<Map> maps;
    std::vector<void*> data;
  };
  const auto outputs = [&] {
    Outputs o;
    for (const NetworkUnit& unit : s.units)
      if (unit.tap) o.maps.push_back(new_map(unit)), o.data.push_back(o.maps.back().data.get());
    return o;
  };
  const auto expect_all_same = [&](const char* what, const Outputs& a, const Outputs& b) {
    for (size_t i = 0; i < a.maps.size(); ++i) expect_same(what, table, a.maps[i], b.maps[i]);
  };
  const Machine several = several_threads(table), one = one_thread(table);
  const auto plan = [&](const Machine& machine) { return plan_network(s, dtype, machine); };
  const Outputs y = outputs(), one_by_one = outputs(), alone = outputs();
  const auto run = [&](const Machine& machine, const Outputs& to, const ParallelFor& parallel) {
    run_network(table, machine, s, plan(machine), dtype, images, packed.get(), to.data.data(), parallel);
  };
  run(several, y, threads_of(several.threads));
  run(several, one_by_one, one_after_the_other);
  expect_all_same("network with workers one after the other", y, one_by_one);
  run(one, alone, nullptr);
  expect_all_same("network", y, alone);
  if (dtype != DType::kFloat32) return true;  // a fused stem's output is not rounded

  std::vector<Map> maps;
  const float* weights_of_unit = packed.get();
  size_t output = 0;
  for (const NetworkUnit& unit : s.units) {
    maps.push_back(new_map(unit));
    void* const to = maps.back().data.get();
    const void* const from = unit.source == kImages ? x.data.get() : maps[static_cast<size_t>(unit.source)].data.get();
    if (unit.kind == UnitKind::kDense) {
      const DenseShape& dense = unit.dense;
      const Images in{from, {dense.h * dense.w * dense.c_in, 1, dense.w * dense.c_in, dense.c_in}};
      run_stem(table, one, dense, dtype, in, weights_of_unit, nullptr, to, nullptr);
      weights_of_unit += stem_size(dense.c_in, dense.c_out, dense.kernel, table.lanes);
    } else if (unit.kind == UnitKind::kBlock) {
      run_block(table, one, unit.block, dtype, from, weights_of_unit, to, nullptr);
      weights_of_unit += block_size(unit.block, table.lanes);
    } else {
      run_head(table, one, unit.head, dtype, from, weights_of_unit, to, nullptr);
    }
    if (unit.tap) expect_same("network and its units", table, y.maps[output++], maps.back());
  }
  return true;
}

// Outputs of a block's training passes, in memory of exactly their size.
struct Trained {
  Map hidden, d_hidden, z, dx, d_project_weight, d_depthwise_weight, d_expand_weight;
  std::vector<double> sums;

  static Map floats(int64_t count) { return Map(DType::kFloat32, count); }
  explicit Trained(const BlockShape& s)
      : hidden(floats(round_up(s.c_hidden, kChunk) * s.n * h_out(s) * w_out(s))),
        d_hidden(floats(hidden.count)),
        z(floats(s.n * h_out(s) * w_out(s) * s.c_out)),
        dx(floats(s.n * s.h * s.w * s.c_in)),
        d_project_weight(floats(s.c_out * s.c_hidden)),
        d_depthwise_weight(floats(s.c_hidden * s.kernel * s.kernel)),
        d_expand_weight(floats(s.c_hidden * s.c_in)),
        sums(static_cast<size_t>(6 * s.c_hidden)) {}
};

// Runs the passes one after the other. `keep`: hidden maps are saved between them; else they are recomputed.
void train(const Passes& passes, const BlockShape& s, TrainTask task, bool keep, Trained& t) {
  const auto sums = [&](int64_t i) { return &t.sums[static_cast<size_t>(i * s.c_hidden)]; };
  const auto data = [](Map& a) { return reinterpret_cast<float*>(a.data.get()); };
  TrainTask pass = task;
  pass.hidden = data(t.hidden);
  passes.hidden(s, pass, sums(0), sums(1));
  pass.out = data(t.z);
  passes.project(s, pass);
  std::fill_n(pass.hidden, t.hidden.count, NAN);
  task.d_project = pass.out;
  if (keep) task.hidden = pass.hidden, task.d_hidden = data(t.d_hidden);
  passes.project_backward(s, task, data(t.d_project_weight), sums(2), sums(3));
  task.out = data(t.dx);
  Passes::Gradients gradients{};
  gradients.d_depthwise_weight = data(t.d_depthwise_weight);
  gradients.d_expand_weight = s.has_expand ? data(t.d_expand_weight) : nullptr;
  gradients.sum_d_expand = sums(4);
  gradients.sum_d_expand_linear = sums(5);
  passes.hidden_backward(s, task, gradients);
  if (keep) return;
  // Both backward passes in one. Sums over strips of the input may round differently.
  Trained one(s);
  gradients.d_project_weight = data(one.d_project_weight);
  gradients.sum_dy = one.sums.data();
  gradients.sum_dy_centred = one.sums.data() + s.c_hidden;
  gradients.with_projection = true;
  task.out = data(one.dx);
  passes.hidden_backward(s, task, gradients);
  expect_same("one pass", passes.kernels, t.dx, one.dx);
  std::vector<double> expected;
  for (int64_t i = 0; i < t.d_project_weight.count; ++i) expected.push_back(t.d_project_weight.at(i));
  expect_close("one pass", passes.kernels, one.d_project_weight, expected);
}

// Hidden maps saved or recomputed, one thread or several: the bits must be the same. Tests in Python check the values.
bool random_training(const KernelTable& table) {
  BlockShape s{};
  if (!random_shape(s)) return false;
  s.residual = false;
  const int64_t taps = s.kernel * s.kernel, row = round_up(s.c_hidden, kChunk);
  const auto expand = values(s.c_hidden * s.c_in, 1 / std::sqrt(s.c_in));
  const auto depthwise = values(s.c_hidden * taps, 1.0 / static_cast<double>(s.kernel));
  const auto project = values(s.c_out * s.c_hidden, 1 / std::sqrt(s.c_hidden));
  const auto norm = values(6 * row, 1);
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
  task.scale = &norm[0];
  task.shift = &norm[static_cast<size_t>(row)];
  task.mean = &norm[static_cast<size_t>(2 * row)];
  for (int i = 0; i < 3; ++i) task.backward[i] = &norm[static_cast<size_t>((3 + i) * row)];

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
    expect_same(what, table, a.d_project_weight, other->d_project_weight);
    expect_same(what, table, a.d_depthwise_weight, other->d_depthwise_weight);
    if (s.has_expand) expect_same(what, table, a.d_expand_weight, other->d_expand_weight);
    if (std::memcmp(a.sums.data(), other->sums.data(), a.sums.size() * sizeof(double)) != 0) {
      std::fprintf(stderr, "%s (%s): other sums\n", what, table.name);
      std::exit(1);
    }
  }
  return true;
}

// Outputs of training channel by channel, in memory of exactly their size.
struct ByChannels {
  Map expanded, hidden, dx, d_project_weight, d_depthwise_weight, d_expand_weight, y, dx_linear, d_linear_weight;
  std::vector<double> norms, sums;

  explicit ByChannels(const BlockShape& s)
      : expanded(Trained::floats(round_up(s.c_hidden, kChunk) * s.n * s.h * s.w)),
        hidden(Trained::floats(round_up(s.c_hidden, kChunk) * s.n * h_out(s) * w_out(s))),
        dx(Trained::floats(s.n * s.h * s.w * s.c_in)),
        d_project_weight(Trained::floats(s.c_out * s.c_hidden)),
        d_depthwise_weight(Trained::floats(s.c_hidden * s.kernel * s.kernel)),
        d_expand_weight(Trained::floats(s.c_hidden * s.c_in)),
        y(Trained::floats(s.n * s.h * s.w * s.c_hidden)),
        dx_linear(Trained::floats(dx.count)),
        d_linear_weight(Trained::floats(d_expand_weight.count)),
        norms(static_cast<size_t>(3 * train::BatchNorm::kVectors * s.c_hidden)),
        sums(static_cast<size_t>(6 * s.c_hidden)) {}
};

// A block and its expansion by itself. `keep`: the expansion is saved; else it is computed again.
void train_by_channels(train::Passes& passes, const BlockShape& s, const train::BlockWeights& weights, const Map& x,
                       const Map& dy, const Map& d_linear, bool keep, ByChannels& t) {
  const auto data = [](const Map& a) { return static_cast<void*>(a.data.get()); };
  const auto sums = [&](int64_t i) {
    return train::NormSums{&t.sums[static_cast<size_t>(2 * i * s.c_hidden)],
                           &t.sums[static_cast<size_t>((2 * i + 1) * s.c_hidden)]};
  };
  const auto norm = [&](int64_t i) {
    const int64_t size = train::BatchNorm::kVectors * s.c_hidden;
    return train::BatchNorm::in(&t.norms[static_cast<size_t>(i * size)], s.c_hidden);
  };
  const train::Conv conv{nullptr, nullptr, nullptr, 1e-5, true, nullptr, nullptr};
  passes.set_block(s, weights);
  passes.hidden_by_channels(data(x), conv, conv, keep ? data(t.expanded) : nullptr, data(t.hidden), norm(0), norm(1));
  passes.set_backward(nullptr);
  train::ChannelGradients found{.project = {data(t.d_project_weight), sums(0)},
                                .d_depthwise = data(t.d_depthwise_weight),
                                .d_expand = data(t.d_expand_weight),
                                .expand = sums(1),
                                .d_x = data(t.dx),
                                .residual = data(x)};
  passes.backward_by_channels(data(x), keep ? data(t.expanded) : nullptr, data(dy), norm(0), norm(1), true, found);
  const BlockShape linear = linear_block({s.n, s.h, s.w, s.c_in}, s.c_hidden, s.act);
  passes.linear_by_channels(linear, data(x), weights.expand, conv, norm(2), data(t.y));
  found = {.project = {},
           .d_depthwise = nullptr,
           .d_expand = data(t.d_linear_weight),
           .expand = sums(2),
           .d_x = data(t.dx_linear),
           .residual = nullptr};
  passes.linear_backward_by_channels(linear, data(x), data(d_linear), weights.expand, norm(2), found);
}

// On one thread and on several, whole chunks or their parts: the bits must be the same.
bool random_training_by_channels(const KernelTable& table) {
  BlockShape s{};
  if (!random_shape(s) || !s.has_expand || s.n * s.h * s.w < 2) return false;
  s.residual = false;
  const auto expand = values(s.c_hidden * s.c_in, 1 / std::sqrt(s.c_in));
  const auto depthwise = values(s.c_hidden * s.kernel * s.kernel, 1.0 / static_cast<double>(s.kernel));
  const auto project = values(s.c_out * s.c_hidden, 1 / std::sqrt(s.c_hidden));
  const train::BlockWeights weights{expand.data(), depthwise.data(), project.data(), nullptr, nullptr};
  const Map x = Map::random(DType::kFloat32, s.n * s.h * s.w * s.c_in);
  const Map dy = Map::random(DType::kFloat32, s.n * h_out(s) * w_out(s) * s.c_out);
  const Map d_linear = Map::random(DType::kFloat32, s.n * s.h * s.w * s.c_hidden);
  const ByChannels* first = nullptr;
  std::deque<ByChannels> all;
  Machine machine = several_threads(table);
  for (const int64_t threads : {1, 2, 3, 7}) {
    for (const bool keep : {false, true}) {
      machine.threads = threads;
      CpuPasses passes(table, machine, threads == 1 ? ParallelFor(one_after_the_other) : threads_of(threads));
      const ByChannels& t = all.emplace_back(s);
      train_by_channels(passes, s, weights, x, dy, d_linear, keep, all.back());
      if (!first) first = &t;
      const char* what = "training channel by channel";
      expect_same(what, table, first->dx, t.dx);
      expect_same(what, table, first->d_project_weight, t.d_project_weight);
      expect_same(what, table, first->d_depthwise_weight, t.d_depthwise_weight);
      expect_same(what, table, first->d_expand_weight, t.d_expand_weight);
      expect_same(what, table, first->y, t.y);
      expect_same(what, table, first->dx_linear, t.dx_linear);
      expect_same(what, table, first->d_linear_weight, t.d_linear_weight);
      const auto same = [](const std::vector<double>& a, const std::vector<double>& b) {
        return std::memcmp(a.data(), b.data(), a.size() * sizeof(double)) == 0;
      };
      if (!same(first->norms, t.norms) || !same(first->sums, t.sums)) {
        std::fprintf(stderr, "%s (%s): other norms or sums\n", what, table.name);
        std::exit(1);
      }
    }
  }
  return true;
}

// The passes over narrow maps, in buffers of exact size: the bits must be the same on one thread and on several.
bool random_maps(const KernelTable& table) {
  const int64_t pixels = pick(1, 3000), c = pick(1, 70), rows = pick(1, 40);
  const Map x = Map::random(DType::kFloat32, pixels * c), g = Map::random(DType::kFloat32, x.count);
  const auto weight = values(rows * c, 1), matrix = values(c * c, 1), vectors = values(4 * c, 1);
  const std::vector<double> vector = std::vector<double>(vectors.begin(), vectors.begin() + c);
  const float* const x_data = reinterpret_cast<const float*>(x.data.get());
  const float* const g_data = reinterpret_cast<const float*>(g.data.get());
  const Machine several = several_threads(table), one = one_thread(table);
  const ParallelFor threads = threads_of(several.threads), alone = one_after_the_other;
  std::vector<double> results[2];
  std::vector<float> maps[2];
  for (int i = 0; i < 2; ++i) {
    const Passes passes{table, i ? one : several, i ? alone : threads};
    std::vector<double> mean(static_cast<size_t>(c)), products(static_cast<size_t>(c * c)),
        sums(static_cast<size_t>(2 * c)), linear(static_cast<size_t>(3 * rows));
    std::vector<float> out(static_cast<size_t>(x.count)), squares(static_cast<size_t>(c * c));
    for (const bool exact : {false, true}) {
      passes.moments(pixels, c, x_data, exact, mean.data(), products.data());
      passes.linear_moments(rows, c, weight.data(), mean.data(), products.data(), linear.data(), linear.data() + rows,
                            linear.data() + 2 * rows);
      for (const auto* v : {&mean, &products, &linear}) results[i].insert(results[i].end(), v->begin(), v->end());
    }
    std::vector<float> scaled(weight.size());
    passes.scale_rows(rows, c, weight.data(), linear.data(), scaled.data(), weight.data(), linear.data() + rows);
    passes.product(rows, c, c, weight.data(), scaled.data(), squares.data());
    passes.map_products(pixels, c, x_data, g_data, vectors.data(), sums.data(), sums.data() + c);
    results[i].insert(results[i].end(), sums.begin(), sums.end());
    passes.map_moments(pixels, c, x_data, sums.data(), sums.data() + c);
    results[i].insert(results[i].end(), sums.begin(), sums.end());
    MapTask combine{};
    combine.channels = c;
    combine.a = x_data, combine.b = g_data, combine.c = g_data;
    combine.scale[0] = vectors.data(), combine.scale[1] = vectors.data() + c, combine.shift = vectors.data() + 2 * c;
    combine.out = out.data();
    passes.map_combine(pixels, combine);
    InputGradientTask input{};
    input.channels = c;
    input.a = out.data(), input.x = x_data, input.residual = g_data, input.out = out.data();
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

// Loops of a block that end late are followed by calls on the calling thread alone, and after a pause by loops. The
// results are the same.
void expect_crowding() {
  const KernelTable& table = *supported_kernels().front();
  const BlockShape s{.n = 2,
                     .h = 6,
                     .w = 6,
                     .c_in = 8,
                     .c_hidden = 48,
                     .c_out = 8,
                     .kernel = 3,
                     .stride = 1,
                     .dilation = 1,
                     .pad = kOnePixel,
                     .has_expand = true,
                     .residual = true,
                     .act = kRelu6};
  const std::unique_ptr<float[]> packed = packed_block(table, s, BlockFloats(s));
  const Map x = Map::random(DType::kFloat32, s.n * s.h * s.w * s.c_in);
  Map alone(x.dtype, x.count), y(x.dtype, x.count);
  run_block(table, one_thread(table), s, x.dtype, x.data.get(), packed.get(), alone.data.get(), nullptr);
  Machine machine = one_thread(table);
  machine.threads = 2;
  int loops = 0;
  const auto call = [&](int count, std::chrono::milliseconds late) {
    const int before = loops;
    for (int i = 0; i < count; ++i) {
      const auto parallel = [&](int64_t workers, const std::function<void(int64_t, int64_t)>& f) {
        ++loops;
        one_after_the_other(workers, f);
        std::this_thread::sleep_for(late);
      };
      run_block(table, machine, s, x.dtype, x.data.get(), packed.get(), y.data.get(), parallel);
      expect_same("a block beside other work", table, y, alone);
    }
    return loops - before;
  };
  watch_crowding(true);
  const int in_time = call(20, {}), late = call(20, std::chrono::milliseconds(30));
  while (crowded()) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  const int after = call(1, {});
  watch_crowding(false);
  if (in_time == 20 && late < 20 && after == 1) return;
  std::fprintf(stderr, "loops: %d of 20 calls in time, %d of 20 late ones, %d of 1 after a pause\n", in_time, late,
               after);
  std::exit(1);
}

}  // namespace

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 40;
  expect_crowding();  // all others use the threads that they ask for
  for (const KernelTable* table : supported_kernels()) {
    generator.seed(1);
    cut_blocks = 0;
    int blocks = 0, stems = 0, heads = 0, networks = 0;
    for (int i = 0; i < rounds; ++i) blocks += random_block(*table);
    for (int i = 0; i < rounds; ++i) stems += random_stem(*table);
    for (int i = 0; i < rounds / 2; ++i) heads += random_head(*table);
    for (int i = 0; i < rounds / 2; ++i) networks += random_network(*table);
    int trained = 0, by_channels = 0, maps = 0;
    for (int i = 0; i < rounds; ++i) trained += random_training(*table);
    for (int i = 0; i < rounds; ++i) by_channels += random_training_by_channels(*table);
    for (int i = 0; i < rounds / 2; ++i) maps += random_maps(*table);
    std::printf(
        "%s: %d blocks (%d with cut columns), %d stems, %d heads, %d networks, %d blocks in training, %d "
        "channel by channel, %d maps\n",
        table->name, blocks, cut_blocks, stems, heads, networks, trained, by_channels, maps);
    if (!blocks || !cut_blocks || !stems || !heads || !networks || !trained || !by_channels || !maps) return 1;
  }
  return 0;
}
