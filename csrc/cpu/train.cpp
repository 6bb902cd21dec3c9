// The training operators on the CPU: checks, tensors to pointers, and the closed form over the CPU's passes.
#include <algorithm>
#include <array>
#include <deque>
#include <memory>
#include <tuple>

#include "../introspect.h"
#include "../train/block.h"
#include "../train/dense.h"
#include "../train/reference.h"
#include "tensors.h"
#include "train_passes.h"

namespace mnv2 {
namespace {

using Tensors = std::vector<OptionalTensor>;
using Ints = std::vector<int64_t>;
using Doubles = std::vector<double>;
using Bools = std::vector<bool>;

constexpr auto kChannelsLast = torch::headeronly::MemoryFormat::ChannelsLast;

// One call of an operator: its passes, and tensors as the passes read them.
class Call {
 public:
  Call(const char* op, const Tensor& x) : op_(op) {
    MNV2_CHECK(x.is_cpu() && x.dim() == 4 && x.numel() > 0, op,
               "x must be a tensor (n, c, h, w) on the CPU, not empty, got ", describe(x));
    check_memory(op, "x", x);
    dtype_ = ScalarType::Double;
    if (x.scalar_type() != dtype_) storage_type(op, "x", x.scalar_type()), dtype_ = ScalarType::Float;
    passes_ = dtype_ == ScalarType::Double ? train::reference_passes() : cpu_train_passes();
  }

  train::Passes& passes() { return *passes_; }
  ScalarType dtype() const { return dtype_; }

  // A map of this size, dense and channels_last.
  const void* map(const char* argument, const Tensor& t, const Ints& sizes) {
    MNV2_CHECK(same_size(t, sizes) && t.is_cpu(), op_, argument, " must be on the CPU and of its output's size, got ",
               describe(t));
    const Tensor own = cast(argument, t);
    return keep(is_channels_last(own) ? own : torch::stable::contiguous(own, kChannelsLast));
  }

  // A tensor in the passes' dtype, of any strides.
  Tensor cast(const char* argument, const Tensor& t) {
    check_memory(op_, argument, t);
    return t.scalar_type() == dtype_ ? t : torch::stable::to(t, dtype_);
  }

  const void* weight(const char* argument, const Tensor& t, const Ints& sizes) {
    MNV2_CHECK(t.is_cpu() && same_size(t, sizes), op_, argument, " must be on the CPU and fit the block, got ",
               describe(t));
    const Tensor dense = cast(argument, t);
    return keep(dense.is_contiguous() ? dense : torch::stable::contiguous(dense));
  }

  // A vector over channels as float64; null for a tensor that is not given.
  const double* vector(const char* argument, const OptionalTensor& t, int64_t channels) {
    if (!t) return nullptr;
    MNV2_CHECK(t->is_cpu() && same_size(*t, {channels}), op_, argument, " must be on the CPU and of size (", channels,
               "), got ", describe(*t));
    check_memory(op_, argument, *t);
    double* const values = passes_->vector(channels);
    const auto copy = [&](const auto* from) {
      for (int64_t i = 0; i < channels; ++i) values[i] = static_cast<double>(from[i * t->stride(0)]);
    };
    if (t->scalar_type() == ScalarType::Float) {
      copy(t->const_data_ptr<float>());
    } else {
      const Tensor wide = torch::stable::contiguous(torch::stable::to(*t, ScalarType::Double));
      std::copy_n(wide.const_data_ptr<double>(), channels, values);
    }
    return values;
  }

  Tensor new_map_like(const Ints& sizes) { return new_map(sizes, dtype_); }

  // The state of a forward, and the same for its backward.
  double* state(const Tensor& t, int64_t size) {
    MNV2_CHECK(t.is_cpu() && t.scalar_type() == ScalarType::Double && same_size(t, {size}) && t.is_contiguous(), op_,
               "state must come from the forward, got ", describe(t));
    check_memory(op_, "state", t);
    return const_cast<double*>(t.const_data_ptr<double>());
  }

 private:
  static bool same_size(const Tensor& t, const Ints& sizes) {
    bool same = t.dim() == static_cast<int64_t>(sizes.size());
    for (size_t d = 0; same && d < sizes.size(); ++d) same = t.size(static_cast<int64_t>(d)) == sizes[d];
    return same;
  }

  static bool is_channels_last(const Tensor& t) {
    int64_t expected = 1;
    for (const int64_t d : {1, 3, 2, 0}) {
      if (t.size(d) != 1 && t.stride(d) != expected) return false;
      expected *= t.size(d);
    }
    return true;
  }

  const void* keep(const Tensor& t) {
    kept_.push_back(t);
    return t.const_data_ptr();
  }

  const char* op_;
  ScalarType dtype_;
  std::unique_ptr<train::Passes> passes_;
  std::deque<Tensor> kept_;
};

Ints sizes_of(const Tensor& t) { return {t.sizes().begin(), t.sizes().end()}; }

// Sums over a process group, which Python knows.
train::SumOverProcesses sum_over(const std::string& group) {
  if (group.empty()) return nullptr;
  return [group](double* values, int64_t size) {
    Tensor sums = empty({size}, ScalarType::Double, false);
    std::copy_n(values, size, sums.mutable_data_ptr<double>());
    std::array<StableIValue, 2> stack{torch::stable::detail::from(sums), torch::stable::detail::from(group)};
    TORCH_ERROR_CODE_CHECK(
        torch_call_dispatcher("mnv2_fused::sum_over_processes", "", stack.data(), TORCH_ABI_VERSION));
    std::copy_n(sums.const_data_ptr<double>(), size, values);
  };
}

// A convolution's weight, gamma and beta from the operators' flat list; its statistics if they are fixed.
struct ConvTensors {
  const char* name;
  OptionalTensor weight, gamma, beta;

  train::Conv conv(Call& call, double eps, bool batch, const Ints& sizes, std::deque<Tensor>* running) const {
    const auto argument = [this](const char* what) { return std::string(name) + what; };
    train::Conv conv{.weight = call.weight(argument("weight").c_str(), *weight, sizes),
                     .gamma = call.vector(argument("gamma").c_str(), gamma, sizes[0]),
                     .beta = call.vector(argument("beta").c_str(), beta, sizes[0]),
                     .eps = eps,
                     .batch = batch,
                     .mean = nullptr,
                     .var = nullptr};
    if (batch || !running) return conv;
    for (const double** to : {&conv.mean, &conv.var}) {
      if (running->empty())
        throw std::invalid_argument(
            "mnv2_fused: running must hold mean and variance of each norm with fixed statistics");
      *to = call.vector("running", running->front(), sizes[0]);
      running->pop_front();
    }
    return conv;
  }
};

// A vector over channels in this dtype; empty if it is not wanted.
Tensor vector_of(const double* from, int64_t channels, ScalarType dtype, bool wanted) {
  Tensor t = empty({wanted ? channels : 0}, dtype, false);
  if (dtype == ScalarType::Double) {
    std::copy_n(from, t.numel(), t.mutable_data_ptr<double>());
  } else {
    std::copy_n(from, t.numel(), t.mutable_data_ptr<float>());
  }
  return t;
}

Tensor as_dtype(const Tensor& t, ScalarType dtype) {
  return t.scalar_type() == dtype ? t : torch::stable::to(t, dtype);
}

// Gradients as an operator returns them: of each given input, in its dtype and shape, or empty if not needed.
class Gradients {
 public:
  Gradients(Call& call, const Bools& needs) : call_(call), needs_(needs) {}

  void* map(const Tensor& x) {
    const bool needed = next(x);
    if (needed) made_.back() = call_.new_map_like(sizes_of(x));
    return needed ? made_.back().mutable_data_ptr() : nullptr;
  }

  // Those of gamma and beta are computed also if they are not needed.
  train::ConvGradients conv(const ConvTensors& from, int64_t channels) {
    if (!from.weight) {
      at_ += 3;
      return {};
    }
    train::ConvGradients gradients{};
    if (next(*from.weight)) {
      made_.back() = empty(sizes_of(*from.weight), call_.dtype(), false);
      gradients.d_weight = made_.back().mutable_data_ptr();
    }
    const std::pair<const OptionalTensor&, double*&> vectors[] = {{from.gamma, gradients.d_gamma},
                                                                  {from.beta, gradients.d_beta}};
    for (const auto& [t, to] : vectors) {
      to = call_.passes().vector(channels);
      if (!t) {
        ++at_;
      } else if (next(*t)) {
        pending_.push_back({made_.size() - 1, to, channels});
      }
    }
    return gradients;
  }

  std::vector<Tensor> finish() {
    for (const auto& [i, from, channels] : pending_) {
      const bool narrow = dtypes_[i] == ScalarType::Float;
      made_[i] = vector_of(from, channels, narrow ? ScalarType::Float : ScalarType::Double, true);
    }
    for (size_t i = 0; i < made_.size(); ++i) made_[i] = as_dtype(made_[i], dtypes_[i]);
    return made_;
  }

 private:
  struct Pending {
    size_t i;
    const double* from;
    int64_t channels;
  };

  // Begins the gradient of `t`, with an empty one. Returns whether it is needed.
  bool next(const Tensor& t) {
    const bool needed = needs_[at_++];
    made_.push_back(needed ? Tensor() : empty({0}, t.scalar_type(), false));
    dtypes_.push_back(t.scalar_type());
    return needed;
  }

  Call& call_;
  const Bools& needs_;
  size_t at_ = 0;
  std::vector<Tensor> made_;
  std::vector<ScalarType> dtypes_;
  std::vector<Pending> pending_;
};

// ------------------------------------------------------------------------------------------------------------- blocks

using BlockConvs = std::array<ConvTensors, 3>;

BlockConvs block_convs(const OptionalTensor& expand_weight, const OptionalTensor& expand_gamma,
                       const OptionalTensor& expand_beta, const Tensor& depthwise_weight,
                       const OptionalTensor& depthwise_gamma, const OptionalTensor& depthwise_beta,
                       const Tensor& project_weight, const OptionalTensor& project_gamma,
                       const OptionalTensor& project_beta) {
  return {{{"expand_", expand_weight, expand_gamma, expand_beta},
           {"depthwise_", depthwise_weight, depthwise_gamma, depthwise_beta},
           {"project_", project_weight, project_gamma, project_beta}}};
}

struct BlockArguments {
  BlockConvs convs;
  const Doubles& eps;
  const Bools& batch;
  const Ints& block;
  const Doubles& bounds;
  const std::string& group;
  const std::string& recompute;
};

train::Block block_of(const char* op, Call& call, const Tensor& x, const BlockArguments& a,
                      std::deque<Tensor>* running) {
  const Activation act = check_bounds(op, a.bounds);
  const BlockShape s = block_shape(op, x, a.block, {act.lo, act.hi, kNoActivation.lo, kNoActivation.hi});
  MNV2_CHECK(a.eps.size() == 3 && a.batch.size() == 3, op, "eps and batch must have 3 values, got ", a.eps.size(),
             " and ", a.batch.size());
  MNV2_CHECK(a.convs[0].weight.has_value() == s.has_expand, op,
             "expand_weight must be given if and only if the block has an expansion");
  train::Block block{.shape = s, .expand = {}, .depthwise = {}, .project = {}, .recompute = {}, .by_channels = false};
  if (a.recompute == "most") {
    block.recompute = train::Recompute::kMost;
  } else if (a.recompute == "least") {
    block.recompute = train::Recompute::kLeast;
  } else {
    MNV2_CHECK(a.recompute == "balanced", op, "recompute must be most, balanced or least, got ", a.recompute);
    block.recompute = train::Recompute::kBalanced;
  }
  const auto conv = [&](size_t i, const Ints& sizes) {
    return a.convs[i].conv(call, a.eps[i], a.batch[i], sizes, running);
  };
  if (s.has_expand) block.expand = conv(0, {s.c_hidden, s.c_in, 1, 1});
  block.depthwise = conv(1, {s.c_hidden, 1, s.kernel, s.kernel});
  block.project = conv(2, {s.c_out, s.c_hidden, 1, 1});
  block.by_channels =
      block.expand_uses_batch() && block.depthwise.batch && a.group.empty() && call.passes().by_channels(s);
  return block;
}

Ints size_in(const BlockShape& s) { return {s.n, s.c_in, s.h, s.w}; }
Ints size_out(const BlockShape& s) { return {s.n, s.c_out, h_out(s), w_out(s)}; }

using BlockOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

BlockOutputs train_block(const Tensor& x, const OptionalTensor& expand_weight, const OptionalTensor& expand_gamma,
                         const OptionalTensor& expand_beta, const Tensor& depthwise_weight,
                         const OptionalTensor& depthwise_gamma, const OptionalTensor& depthwise_beta,
                         const Tensor& project_weight, const OptionalTensor& project_gamma,
                         const OptionalTensor& project_beta, const std::vector<Tensor>& running, const Doubles& eps,
                         const Bools& batch, const Ints& block, const Doubles& bounds, const std::string& group,
                         const std::string& recompute, bool save) {
  const char* op = "train_block";
  Call call(op, x);
  std::deque<Tensor> fixed(running.begin(), running.end());
  const train::Block b =
      block_of(op, call, x,
               {block_convs(expand_weight, expand_gamma, expand_beta, depthwise_weight, depthwise_gamma, depthwise_beta,
                            project_weight, project_gamma, project_beta),
                eps, batch, block, bounds, group, recompute},
               &fixed);
  const BlockShape& s = b.shape;
  const void* source = call.map("x", x, size_in(s));
  Tensor y = call.new_map_like(size_out(s)), projected = save ? call.new_map_like(size_out(s)) : y;
  const int64_t saved = save ? b.saved_size(call.passes()) : 0;
  Tensor wide = empty({saved}, call.dtype(), false);
  if (saved) advise_huge_pages(wide.mutable_data_ptr(), saved * static_cast<int64_t>(wide.element_size()));
  Tensor state = empty({train::BlockState::size(b)}, ScalarType::Double, false);
  const train::BlockState found = train::BlockState::in(state.mutable_data_ptr<double>(), b);
  train::block_forward(call.passes(), b, source, sum_over(group), y.mutable_data_ptr(), projected.mutable_data_ptr(),
                       saved ? wide.mutable_data_ptr() : nullptr, found);
  const ScalarType dtype = x.scalar_type();
  const auto statistic = [&call](const double* from, int64_t channels, bool wanted) {
    return vector_of(from, channels, call.dtype(), wanted);
  };
  const bool expand = b.expand_uses_batch(), depthwise = b.depthwise.batch, project = b.project.batch;
  return {as_dtype(y, dtype),
          save ? as_dtype(projected, dtype) : empty({0}, dtype, false),
          wide,
          state,
          statistic(found.expand.mean, s.c_hidden, expand),
          statistic(found.expand.unbiased, s.c_hidden, expand),
          statistic(found.depthwise.mean, s.c_hidden, depthwise),
          statistic(found.depthwise.unbiased, s.c_hidden, depthwise),
          statistic(found.project.mean, s.c_out, project),
          statistic(found.project.unbiased, s.c_out, project)};
}

std::vector<Tensor> train_block_backward(const Tensor& dy, const Tensor& x, const Tensor& projected, const Tensor& wide,
                                         const Tensor& state, const OptionalTensor& expand_weight,
                                         const OptionalTensor& expand_gamma, const OptionalTensor& expand_beta,
                                         const Tensor& depthwise_weight, const OptionalTensor& depthwise_gamma,
                                         const OptionalTensor& depthwise_beta, const Tensor& project_weight,
                                         const OptionalTensor& project_gamma, const OptionalTensor& project_beta,
                                         const Doubles& eps, const Bools& batch, const Ints& block,
                                         const Doubles& bounds, const std::string& group, const std::string& recompute,
                                         const Bools& needs) {
  const char* op = "train_block_backward";
  Call call(op, x);
  const BlockArguments arguments{
      block_convs(expand_weight, expand_gamma, expand_beta, depthwise_weight, depthwise_gamma, depthwise_beta,
                  project_weight, project_gamma, project_beta),
      eps,
      batch,
      block,
      bounds,
      group,
      recompute};
  const train::Block b = block_of(op, call, x, arguments, nullptr);
  const BlockShape& s = b.shape;
  MNV2_CHECK(needs.size() == 10, op, "needs must have 10 values, got ", needs.size());
  const auto needs_of = [&needs](size_t i) { return train::Needs{needs[i], needs[i + 1], needs[i + 2]}; };
  const train::BlockNeeds wanted{needs[0], needs_of(1), needs_of(4), needs_of(7)};
  const bool saved = wide.numel() > 0;
  MNV2_CHECK(!saved || (wide.numel() == b.saved_size(call.passes()) && wide.scalar_type() == call.dtype()), op,
             "wide must come from the forward, got ", describe(wide));
  check_memory(op, "wide", wide);
  Gradients gradients(call, needs);
  train::BlockGradients to{};
  to.d_x = gradients.map(x);
  to.expand = gradients.conv(arguments.convs[0], s.c_hidden);
  to.depthwise = gradients.conv(arguments.convs[1], s.c_hidden);
  to.project = gradients.conv(arguments.convs[2], s.c_out);
  train::block_backward(call.passes(), b, call.map("dy", dy, size_out(s)), call.map("x", x, size_in(s)),
                        projected.numel() > 0 ? call.map("projected", projected, size_out(s)) : nullptr,
                        saved ? const_cast<void*>(wide.const_data_ptr()) : nullptr,
                        train::BlockState::in(call.state(state, train::BlockState::size(b)), b), wanted,
                        sum_over(group), to);
  return gradients.finish();
}

// ------------------------------------------------------------------------------------------------ dense convolutions

train::Dense dense_of(const char* op, Call& call, const Tensor& x, const ConvTensors& conv, double eps, bool batch,
                      const Ints& dense, const Doubles& bounds, const std::string& group, std::deque<Tensor>* running) {
  const DenseShape s = dense_shape(op, x, dense, bounds);
  train::Dense d{s, conv.conv(call, eps, batch, {s.c_out, s.c_in, s.kernel, s.kernel}, running), false};
  d.by_channels = batch && group.empty() && d.is_pointwise() && call.passes().by_channels(d.of_windows());
  return d;
}

// x where it lies, unless it must be dense.
train::Input input_of(Call& call, const train::Dense& dense, const Tensor& x, Tensor& kept) {
  const DenseShape& s = dense.shape;
  if (dense.is_pointwise()) {
    return {call.map("x", x, {s.n, s.c_in, s.h, s.w}), {s.h * s.w * s.c_in, 1, s.w * s.c_in, s.c_in}};
  }
  kept = call.cast("x", x);
  return {kept.const_data_ptr(), {kept.stride(0), kept.stride(1), kept.stride(2), kept.stride(3)}};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> train_dense(const Tensor& x, const Tensor& weight,
                                                       const OptionalTensor& gamma, const OptionalTensor& beta,
                                                       const std::vector<Tensor>& running, double eps, bool batch,
                                                       const Ints& dense, const Doubles& bounds,
                                                       const std::string& group) {
  const char* op = "train_dense";
  Call call(op, x);
  std::deque<Tensor> fixed(running.begin(), running.end());
  const train::Dense d = dense_of(op, call, x, {"", weight, gamma, beta}, eps, batch, dense, bounds, group, &fixed);
  const DenseShape& s = d.shape;
  Tensor kept = x, y = call.new_map_like({s.n, s.c_out, h_out(s), w_out(s)});
  Tensor state = empty({train::DenseState::size(d)}, ScalarType::Double, false);
  const train::DenseState found = train::DenseState::in(state.mutable_data_ptr<double>(), d);
  train::dense_forward(call.passes(), d, input_of(call, d, x, kept), sum_over(group), y.mutable_data_ptr(), found);
  return {as_dtype(y, x.scalar_type()), state, vector_of(found.norm.mean, s.c_out, call.dtype(), batch),
          vector_of(found.norm.unbiased, s.c_out, call.dtype(), batch)};
}

std::vector<Tensor> train_dense_backward(const Tensor& dy, const Tensor& x, const Tensor& state, const Tensor& weight,
                                         const OptionalTensor& gamma, const OptionalTensor& beta, double eps,
                                         bool batch, const Ints& dense, const Doubles& bounds, const std::string& group,
                                         const Bools& needs) {
  const char* op = "train_dense_backward";
  Call call(op, x);
  const ConvTensors conv{"", weight, gamma, beta};
  const train::Dense d = dense_of(op, call, x, conv, eps, batch, dense, bounds, group, nullptr);
  const DenseShape& s = d.shape;
  MNV2_CHECK(needs.size() == 4, op, "needs must have 4 values, got ", needs.size());
  Gradients gradients(call, needs);
  train::DenseGradients to{};
  to.d_x = gradients.map(x);
  to.conv = gradients.conv(conv, s.c_out);
  Tensor kept = x;
  train::dense_backward(call.passes(), d, call.map("dy", dy, {s.n, s.c_out, h_out(s), w_out(s)}),
                        input_of(call, d, x, kept),
                        train::DenseState::in(call.state(state, train::DenseState::size(d)), d),
                        {needs[1], needs[2], needs[3]}, sum_over(group), to);
  return gradients.finish();
}

}  // namespace

std::unique_ptr<train::Passes> cpu_train_passes() {
  return std::make_unique<CpuPasses>(kernels(), this_machine(), ParallelFor(parallel_for));
}

std::unique_ptr<train::Passes> reference_train_passes() { return train::reference_passes(); }

STABLE_TORCH_LIBRARY_IMPL(mnv2_fused, CPU, m) {
  m.impl("train_block", TORCH_BOX(&train_block));
  m.impl("train_block_backward", TORCH_BOX(&train_block_backward));
  m.impl("train_dense", TORCH_BOX(&train_dense));
  m.impl("train_dense_backward", TORCH_BOX(&train_dense_backward));
}

}  // namespace mnv2
