// The kernels of csrc/cuda on the host, for Python: plans, packs and runs as the launcher does.
#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "cuda/arguments.h"
#include "cuda/run.h"
#include "cuda/variants.cuh"
#include "emulator.h"

namespace {

using namespace mnv2;
using namespace mnv2::cuda;
using namespace mnv2::emulator;

// Device memory with a copy of `data` from byte `at` on; guarded at its end, or under odd schedules at its start.
struct Buffer : GuardedMemory {
  Buffer(int64_t schedule, const void* data, int64_t bytes, int64_t at = 0)
      : GuardedMemory(static_cast<size_t>(bytes), schedule % 2 != 0) {
    if (data) std::memcpy(this->data() + at, data, static_cast<size_t>(bytes - at));
  }
};

// Output for `images` images; copy_to() leaves out those before image `first`.
struct Output : Buffer {
  Output(int64_t schedule, int64_t images, int64_t first, int64_t bytes)
      : Buffer(schedule, nullptr, bytes), from(static_cast<size_t>(bytes / images * first)) {
    fill_with_nan(from);
  }
  void copy_to(void* y) const { std::memcpy(y, data() + from, size() - from); }

  const size_t from;
};

// in_flight: memory that kernels before this one may still use: all except weights.
void run(const cuda::Grid& grid, int64_t first_x, int64_t schedule, const std::vector<const GuardedMemory*>& in_flight,
         const std::function<void()>& body) {
  const emulator::Grid ctas{.x = static_cast<int>(grid.x),
                            .y = static_cast<int>(grid.y),
                            .z = static_cast<int>(grid.z),
                            .cluster = static_cast<int>(grid.cluster),
                            .first_x = static_cast<int>(first_x)};
  launch(ctas, static_cast<int>(grid.threads), static_cast<size_t>(grid.shared),
         Schedule::number(static_cast<int>(schedule)), body, in_flight);
}

// Calls f with the arithmetic of dtype 0 fp32, 1 bf16, 2 fp16 or 3 fp32 in tf32. ONE_VARIANT builds in seconds: only
// fp16, two tiles of output channels, and 3x3 at stride 1.
template <class F>
void with_math(int64_t dtype, F&& f) {
#ifdef ONE_VARIANT
  if (dtype != 2) throw std::invalid_argument("fp16 alone");
  f(HalfMath{});
#else
  switch (dtype) {
    case 0: return f(FloatMath<true>{});
    case 1: return f(BFloat16Math{});
    case 2: return f(HalfMath{});
    default: return f(FloatMath<false>{});
  }
#endif
}
DType storage(int64_t dtype) { return static_cast<DType>(dtype == 3 ? 0 : dtype); }

Device device_of(const int64_t* d) {
  return {
      .multiprocessors = d[0], .shared_block = d[1], .shared_all = d[2], .cluster = d[3], .dependent_launch = false};
}

// n, h, w, c, then the fields of csrc/shapes.h.
ImageSize size_of(const int64_t* s) { return {s[0], s[1], s[2], s[3]}; }
BlockShape block_of(const int64_t* s, const float* bounds) {
  return block_from(size_of(s), s + 4, {bounds[0], bounds[1]}, {bounds[2], bounds[3]});
}
DenseShape dense_of(const int64_t* s, float lo, float hi) { return dense_from(size_of(s), s + 4, {lo, hi}); }
HeadShape head_of(const int64_t* s, float lo, float hi) { return head_from(size_of(s), s + 4, {lo, hi}); }

NetworkShape network_of(const int64_t* x, const char* units, const char* bounds) {
  std::string rule;
  const NetworkShape s = network_from(size_of(x), {units, bounds}, &rule);
  if (!rule.empty()) throw std::runtime_error(rule);
  return s;
}

template <class M>
void pack(PackArgs& args, const float* const* weights, const Buffer& packed) {
  packed.fill_with_nan();
  args.expand = weights[0], args.expand_bias = weights[1];
  args.depthwise = weights[2], args.depthwise_bias = weights[3];
  args.project = weights[4], args.project_bias = weights[5];
  args.packed = packed.data();
  // Without stacks of their own: its threads share nothing, wait for nobody, and are many.
  const cuda::Grid grid = pack_grid(args);
  for (int block = 0; block < grid.x; ++block) {
    for (int thread = 0; thread < grid.threads; ++thread) {
      current = {.thread = thread, .block_x = block, .block_y = 0, .block_z = 0, .shared = nullptr};
      pack_kernel<M>(args);
    }
  }
}

// Calls f with the variant of block_kernel for `args`.
template <class M, class F>
void with_variant(const BlockArgs& args, const BlockPlan& plan, F&& f) {
#ifdef ONE_VARIANT
  if (plan.columns.tiles != 2 || args.kernel != 3 || args.stride != 1 || args.dilation != 1)
    throw std::invalid_argument("one variant alone");
  f(block_kernel<M, 2, kStride1>);
#else
  with_block_kernel<M>(args, plan.columns.tiles, f);
#endif
}

// Runs the images from `first` on, and those that share thread blocks with them.
template <class M>
void run_block(BlockArgs& args, const BlockPlan& plan, int64_t first, int64_t schedule, const Buffer& input, void* y,
               int64_t y_bytes) {
  const Buffer partial(schedule, nullptr, plan.partial * 4), tickets(schedule, nullptr, plan.tickets * 4);
  const Output output(schedule, args.n, first, y_bytes);
  const int64_t first_x = first / (args.images * args.rounds) * args.tiles_y * args.tiles_x;
  if (first == 0) partial.fill_with_nan();
  args.y = output.data();
  args.partial = reinterpret_cast<float*>(partial.data());
  args.tickets = reinterpret_cast<uint32_t*>(tickets.data());
  with_variant<M>(args, plan, [&](auto* kernel) {
    run(block_grid(plan, args), first_x, schedule, {&input, &partial, &tickets, &output}, [&] { kernel(args); });
  });
  for (int64_t i = first_x * args.parts; i < plan.tickets; ++i)
    if (args.tickets[i]) throw std::runtime_error("a ticket is left");
  output.copy_to(y);
}

// Packs all units one after the other; weights: see emulate_network().
template <class M>
void pack_network(const NetworkShape& s, DType type, int64_t schedule, const float* const* weights, unsigned char* to) {
  const auto pack_unit = [&](PackArgs args, std::initializer_list<int> places, int64_t size) {
    const float* unit[6] = {};
    for (const int place : places) unit[place] = *weights++;
    const Buffer part(schedule, nullptr, size);
    pack<M>(args, unit, part);
    std::memcpy(to, part.data(), static_cast<size_t>(size));
    to += size;
  };
  const auto pack_matrix = [&](int64_t channels, int64_t kernel, int64_t columns) {
    pack_unit(matrix_pack_args(channels, kernel, columns, type), {0, 1},
              matrix_size(window_values(channels, kernel), columns, type));
  };
  for (const NetworkUnit& unit : s.units) {
    const BlockShape& b = unit.block;
    const HeadShape& h = unit.head;
    if (unit.kind == UnitKind::kDense) {
      pack_matrix(unit.dense.c_in, unit.dense.kernel, unit.dense.c_out);
    } else if (unit.kind == UnitKind::kBlock) {
      const int64_t c_in = b.has_expand ? b.c_in : 0;
      pack_unit(block_pack_args(c_in, b.c_hidden, b.c_out, b.kernel, type), {0, 1, 2, 3, 4, 5},
                cuda::block_layout(c_in, b.c_hidden, b.c_out, b.kernel, type).size);
    } else {
      pack_matrix(h.c_in, 1, h.c_last);
      pack_matrix(h.c_last, 1, h.classes);
    }
  }
}

// tile: height, width and images, splits of the hidden channels, whether to expand ahead, and rounds or 0. Zeros: those
// of plan_block().
BlockPlan plan_of(const BlockShape& s, DType type, const int64_t* device, const int64_t* tile,
                  const DenseShape* stem = nullptr) {
  const Device d = device_of(device);
  if (!tile[0]) {
    if (const std::string why = unfit(s, type, d.shared_block); !why.empty()) throw std::runtime_error(why);
    return plan_block(s, type, d, stem);
  }
  BlockPlan plan{};
  for (int64_t buffers = 2; buffers > 0 && !plan.fits; --buffers)
    plan = plan_tile(s, type, d, tile[0], tile[1], tile[2], tile[3], buffers, tile[4] != 0, stem, tile[5]);
  if (tile[4] && !plan.ahead) throw std::runtime_error("the tile is not expanded ahead");
  if (!plan.fits) throw std::runtime_error("the tile does not fit");
  return plan;
}

// A stem's images, from the first to the last element; x: those from image `first` on.
struct Input : Buffer {
  Input(int64_t schedule, const void* x, const DenseShape& s, const int64_t* strides, int64_t first, DType type)
      : Buffer(schedule, nullptr,
               ((s.n - 1) * strides[0] + (s.c_in - 1) * strides[1] + plane(s, strides)) * dtype_bytes(type)),
        strides(strides) {
    // Plane by plane: what lies between them may be more than the machine's memory.
    for (int64_t n = first; n < s.n; ++n) {
      for (int64_t c = 0; c < s.c_in; ++c) {
        const int64_t from = ((n - first) * strides[0] + c * strides[1]) * dtype_bytes(type);
        std::memcpy(data() + first * strides[0] * dtype_bytes(type) + from, static_cast<const char*>(x) + from,
                    static_cast<size_t>(plane(s, strides) * dtype_bytes(type)));
      }
    }
  }
  static int64_t plane(const DenseShape& s, const int64_t* strides) {
    return (s.h - 1) * strides[2] + (s.w - 1) * strides[3] + 1;
  }
  Images images() const { return {.data = data(), .strides = {strides[0], strides[1], strides[2], strides[3]}}; }

  const int64_t* const strides;
};

int64_t output_bytes(const BlockShape& s, DType dtype) {
  return s.n * h_out(s) * w_out(s) * s.c_out * dtype_bytes(dtype);
}

}  // namespace

extern "C" {

// first: images before it are zeros and are not computed; x and y begin with it. device: multiprocessors, shared memory
// of a block and of all. bounds: lo and hi of the activation and of the output. Maps are NHWC. weights: expand,
// depthwise, project, each with its bias, fp32; null if there is none. Writes the plan, see Planned in
// tests/cuda/test_cuda_kernels.py.
const char* emulate_block(int64_t schedule, int64_t first, const int64_t* device, const int64_t* tile,
                          const int64_t* shape, const float* bounds, int64_t dtype, const float* const* weights,
                          const void* x, void* y, int64_t* planned) {
  return report([&] {
    const BlockShape s = block_of(shape, bounds);
    const DType type = storage(dtype);
    const BlockPlan plan = plan_of(s, type, device, tile);
    const int64_t facts[] = {plan.tile_h, plan.tile_w,        plan.images,        plan.threads,
                             plan.splits, plan.columns.parts, plan.columns.tiles, plan.buffers,
                             plan.shared, plan.ahead,         plan.rounds};
    std::memcpy(planned, facts, sizeof facts);
    const int64_t image = s.h * s.w * s.c_in * dtype_bytes(type), c_in = s.has_expand ? s.c_in : 0;
    const Buffer input(schedule, x, s.n * image, first * image);
    const Buffer packed(schedule, nullptr, block_layout(c_in, s.c_hidden, s.c_out, s.kernel, type).size);
    with_math(dtype, [&](auto math) {
      using M = decltype(math);
      PackArgs pack_args = block_pack_args(c_in, s.c_hidden, s.c_out, s.kernel, type);
      pack<M>(pack_args, weights, packed);
      BlockArgs args = block_args(s, plan, type);
      args.x = input.data();
      set_packed(args, packed.data());
      run_block<M>(args, plan, first, schedule, input, y, output_bytes(s, type));
    });
  });
}

// The stem and a first block without expansion in one. strides: of the images, in elements.
const char* emulate_joined(int64_t schedule, int64_t first, const int64_t* device, const int64_t* tile,
                           const int64_t* stem, const int64_t* block, float lo, float hi, const float* block_bounds,
                           int64_t dtype, const float* const* weights, const void* x, const int64_t* strides, void* y) {
  return report([&] {
    const DenseShape s = dense_of(stem, lo, hi);
    const BlockShape b = joined(s, block_of(block, block_bounds));
    const DType type = storage(dtype);
    const BlockPlan plan = plan_of(b, type, device, tile, &s);
    const Input input(schedule, x, s, strides, first, type);
    const Buffer packed(schedule, nullptr, block_layout(0, b.c_hidden, b.c_out, b.kernel, type).size);
    const Buffer packed_stem(schedule, nullptr, matrix_size(b.c_in, b.c_hidden, type));
    with_math(dtype, [&](auto math) {
      using M = decltype(math);
      const float* const stem_weights[6] = {weights[0], weights[1]};
      const float* const block_weights[6] = {nullptr, nullptr, weights[2], weights[3], weights[4], weights[5]};
      PackArgs stem_pack = matrix_pack_args(s.c_in, s.kernel, s.c_out, type);
      pack<M>(stem_pack, stem_weights, packed_stem);
      PackArgs block_pack = block_pack_args(0, b.c_hidden, b.c_out, b.kernel, type);
      pack<M>(block_pack, block_weights, packed);
      BlockArgs args = joined_args(s, input.images(), b, plan, type);
      args.stem = packed_stem.data();
      set_packed(args, packed.data());
      run_block<M>(args, plan, first, schedule, input, y, output_bytes(b, type));
    });
  });
}

// image_bias: (n, c_out), from image `first` on; or null.
const char* emulate_stem(int64_t schedule, int64_t first, const int64_t* device, const int64_t* shape, float lo,
                         float hi, int64_t dtype, const float* const* weights, const float* image_bias, const void* x,
                         const int64_t* strides, void* y) {
  return report([&] {
    const DenseShape s = dense_of(shape, lo, hi);
    const DType type = storage(dtype);
    const int64_t bytes = s.n * h_out(s) * w_out(s) * s.c_out * dtype_bytes(type);
    const Input input(schedule, x, s, strides, first, type);
    const Output output(schedule, s.n, first, bytes);
    const Buffer biases(schedule, image_bias, s.n * s.c_out * 4, first * s.c_out * 4);
    const Buffer packed(schedule, nullptr, dense_size(s, type));
    with_math(dtype, [&](auto math) {
      using M = decltype(math);
      PackArgs pack_args = matrix_pack_args(s.c_in, s.kernel, s.c_out, type);
      pack<M>(pack_args, weights, packed);
      StemArgs args = stem_args(s, input.images(), type, device_of(device));
      args.packed = packed.data(), args.y = output.data();
      if (image_bias) args.image_bias = reinterpret_cast<const float*>(biases.data());
      const cuda::Grid grid = stem_grid(args);
      run(grid, grid.x / s.n * first, schedule, {&input, &biases, &output}, [&] { stem_kernel<M>(args); });
    });
    output.copy_to(y);
  });
}

// weights: the convolution's and, at 4 and 5, the classifier's. first: a multiple of kClassifyImages.
const char* emulate_head(int64_t schedule, int64_t first, const int64_t* device, const int64_t* shape, float lo,
                         float hi, int64_t dtype, const float* const* weights, const void* x, void* y) {
  return report([&] {
    const HeadShape s = head_of(shape, lo, hi);
    const DType type = storage(dtype);
    const int64_t image = s.h * s.w * s.c_in * dtype_bytes(type);
    const Buffer input(schedule, x, s.n * image, first * image);
    const Output output(schedule, s.n, first, s.n * s.classes * dtype_bytes(type));
    const Output pooled(schedule, s.n, first, s.n * pooled_row(s) * dtype_bytes(type));
    const Buffer packed(schedule, nullptr, matrix_size(s.c_in, s.c_last, type)),
        classifier(schedule, nullptr, matrix_size(s.c_last, s.classes, type));
    with_math(dtype, [&](auto math) {
      using M = decltype(math);
      PackArgs conv = matrix_pack_args(s.c_in, 1, s.c_last, type);
      pack<M>(conv, weights, packed);
      const float* const linear_weights[6] = {weights[4], weights[5]};
      PackArgs linear = matrix_pack_args(s.c_last, 1, s.classes, type);
      pack<M>(linear, linear_weights, classifier);
      PoolArgs pool = pool_args(s, type, device_of(device));
      pool.x = input.data(), pool.packed = packed.data(), pool.pooled = pooled.data();
      const auto in_flight = {static_cast<const GuardedMemory*>(&input), static_cast<const GuardedMemory*>(&pooled),
                              static_cast<const GuardedMemory*>(&output)};
      with_pool_kernel<M>(pool, [&](auto* kernel) {
        run(pool_grid(pool), first / pool.images, schedule, in_flight, [&] { kernel(pool); });
      });
      ClassifyArgs classify = classify_args(s, type, device_of(device));
      classify.pooled = pooled.data(), classify.packed = classifier.data(), classify.y = output.data();
      run(classify_grid(classify), first / kClassifyImages, schedule, in_flight,
          [&] { classify_kernel<typename LinearMath<M>::Type>(classify); });
    });
    output.copy_to(y);
  });
}

// Launches of an operator's kernels, in order: 1 if a kernel may begin before the one ahead of it has ended, else 0.
// unit: 0 a block, 1 a stem, 2 a head, 3 a network of them, 4 a network with stem and block joined. Nothing is run.
const char* emulate_launches(int64_t unit, int64_t* dependent, int64_t* count) {
  return report([&] {
    static std::vector<int64_t> launched;
    launched.clear();
    static const auto noted = [](Stream stream) -> const char* {
      launched.push_back(stream.dependent_launch);
      return nullptr;
    };
    const KernelTable table{.compiled_for = nullptr,
                            .load = nullptr,
                            .pack = nullptr,
                            .block = [](const BlockArgs&, const BlockPlan&, Stream s) { return noted(s); },
                            .stem = [](const StemArgs&, Stream s) { return noted(s); },
                            .pool = [](const PoolArgs&, Stream s) { return noted(s); },
                            .classify = [](const ClassifyArgs&, Stream s) { return noted(s); }};
    const Device d = known_device("sm_90");
    const Stream stream{.handle = nullptr, .dependent_launch = true};
    const DType type = DType::kFloat16;
    static unsigned char anywhere[16];
    unsigned char* const memory = anywhere;
    DenseShape stem = dense_of_weights(3, 8, 3);
    BlockShape block = block_of_weights(8, unit == 4 ? 8 : 16, 8, 3, unit != 4);
    HeadShape head = head_of_weights(8, 16, 10);
    stem.n = block.n = head.n = 1;
    stem.h = stem.w = block.h = block.w = head.h = head.w = 8;
    stem.pad = block.pad = {1, 1, 1, 1};
    stem.act = block.act = head.act = {0, 6};
    const Images images{.data = nullptr, .strides = {192, 1, 24, 3}};
    if (unit == 0)
      run_block(table, block, plan_block(block, type, d), type, nullptr, memory, memory, memory, stream);
    else if (unit == 1)
      run_stem(table, stem, type, d, images, memory, nullptr, memory, stream);
    else if (unit == 2)
      run_head(table, head, type, d, nullptr, memory, memory, memory, stream);
    else {
      const auto unit_of = [](UnitKind kind, int64_t source, bool tap) {
        NetworkUnit u{};
        u.kind = kind, u.source = source, u.tap = tap;
        return u;
      };
      NetworkShape s{{1, 8, 8, 3},
                     {unit_of(UnitKind::kDense, kImages, false), unit_of(UnitKind::kBlock, 0, false),
                      unit_of(UnitKind::kBlock, 1, false), unit_of(UnitKind::kHead, 2, true)}};
      s.units[0].dense = stem, s.units[1].block = s.units[2].block = block, s.units[3].head = head;
      void* outputs[] = {memory};
      run_network(table, s, mnv2::cuda::plan_network(s, type, d), type, d, images, memory, memory, outputs, stream);
    }
    *count = static_cast<int64_t>(launched.size());
    std::memcpy(dependent, launched.data(), launched.size() * sizeof(int64_t));
  });
}

// A network as its operator runs it. units, bounds: the operator's texts. weights: unit after unit, two for a dense
// convolution, six for a block, four for a head. y: the outputs, one after the other. Writes whether stem and first
// block are joined, and the least and the most splits of a block.
const char* emulate_network(int64_t schedule, const int64_t* device, const int64_t* x_shape, const int64_t* strides,
                            const char* units, const char* bounds, int64_t dtype, const float* const* weights,
                            const void* x, void* y, int64_t* planned) {
  return report([&] {
    const NetworkShape s = network_of(x_shape, units, bounds);
    const DType type = storage(dtype);
    const Device d = device_of(device);
    if (const std::string why = mnv2::cuda::unfit(s, type, d.shared_block); !why.empty()) throw std::runtime_error(why);
    const NetworkPlan plan = mnv2::cuda::plan_network(s, type, d);
    planned[0] = plan.joined, planned[1] = plan.blocks.empty() ? 0 : plan.blocks[0].splits, planned[2] = 0;
    for (const BlockPlan& block : plan.blocks) {
      planned[1] = std::min(planned[1], block.splits);
      planned[2] = std::max(planned[2], block.splits);
    }
    const Input input(schedule, x, s.units[0].dense, strides, 0, type);
    std::vector<std::unique_ptr<Output>> outputs;
    std::vector<void*> maps;
    std::vector<int64_t> sizes;
    for (const NetworkUnit& unit : s.units) {
      if (!unit.tap) continue;
      const ImageSize size = output_of(unit);
      sizes.push_back(size.n * size.h * size.w * size.c * dtype_bytes(type));
      outputs.push_back(std::make_unique<Output>(schedule, s.images.n, 0, sizes.back()));
      maps.push_back(outputs.back()->data());
    }
    const Buffer packed(schedule, nullptr, mnv2::cuda::network_size(s, type)),
        memory(schedule, nullptr, plan.memory.size);
    memory.fill_with_nan();
    std::memset(memory.data() + plan.memory.size - plan.memory.tickets, 0, static_cast<size_t>(plan.memory.tickets));
    with_math(dtype, [&](auto math) {
      using M = decltype(math);
      pack_network<M>(s, type, schedule, weights, packed.data());
      static std::function<void(const cuda::Grid&, const std::function<void()>&)> start;  // the launchers hold no state
      start = [&](const cuda::Grid& grid, const std::function<void()>& body) {
        std::vector<const GuardedMemory*> buffers{&input, &memory};
        for (const auto& output : outputs) buffers.push_back(output.get());
        run(grid, 0, schedule, buffers, body);
      };
      const KernelTable table{.compiled_for = nullptr,
                              .load = nullptr,
                              .pack = nullptr,
                              .block = [](const BlockArgs& a, const BlockPlan& p, Stream) -> const char* {
                                with_variant<M>(a, p,
                                                [&](auto* kernel) { start(block_grid(p, a), [&] { kernel(a); }); });
                                return nullptr;
                              },
                              .stem = [](const StemArgs& a, Stream) -> const char* {
                                start(stem_grid(a), [&] { stem_kernel<M>(a); });
                                return nullptr;
                              },
                              .pool = [](const PoolArgs& a, Stream) -> const char* {
                                with_pool_kernel<M>(a, [&](auto* kernel) { start(pool_grid(a), [&] { kernel(a); }); });
                                return nullptr;
                              },
                              .classify = [](const ClassifyArgs& a, Stream) -> const char* {
                                start(classify_grid(a), [&] { classify_kernel<typename LinearMath<M>::Type>(a); });
                                return nullptr;
                              }};
      run_network(table, s, plan, type, d, input.images(), packed.data(), memory.data(), maps.data(), {});
    });
    const unsigned char* const tickets = memory.data() + plan.memory.size - plan.tickets;
    if (std::any_of(tickets, tickets + plan.tickets, [](unsigned char byte) { return byte != 0; }))
      throw std::runtime_error("a ticket is left");
    auto* to = static_cast<unsigned char*>(y);
    for (size_t i = 0; i < outputs.size(); ++i) outputs[i]->copy_to(to), to += sizes[i];
  });
}
}
