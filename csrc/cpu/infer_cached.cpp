// The cached_* operators on the CPU: the inference operators in traced graphs. They take a unit's parameters and
// buffers unpacked, keep the packed weights, and pack again if a tensor has changed. mnv2_fused/_core/freshness.py says
// what is watched. Programs without Python run these, too.
#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <numeric>
#include <unordered_map>

#include "../fingerprint.h"
#include "../introspect.h"
#include "infer.h"
#include "tensors.h"

namespace mnv2 {
namespace {

using Tensors = std::vector<OptionalTensor>;

template <class Result>
Result call(const char* operator_name, const Tensor& t) {
  std::array<StableIValue, 1> stack{torch::stable::detail::from(t)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(operator_name, "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Result>(stack[0]);
}

int64_t storage_bytes(const Tensor& t) {
  int64_t bytes = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(t.get(), &bytes));
  return bytes;
}

// --------------------------------------------------------------------------------------------------------- freshness

// A tensor and what is remembered of it.
class Watched {
 public:
  // Adds the part of memory whose contents are to be watched.
  Watched(const char* op, const Tensor& t, std::vector<Region>& regions)
      : alive_(call<Tensor>("aten::detach", t)),
        data_(t.const_data_ptr()),
        bytes_(storage_bytes(t)),
        dtype_(t.scalar_type()),
        sizes_(t.sizes().begin(), t.sizes().end()),
        strides_(t.strides().begin(), t.strides().end()) {
    check_memory(op, "a weight", t);
    MNV2_CHECK(t.is_cpu(), op, "the weights must be on the device of x, the CPU");
    if (t.numel() == 0) return;
    if (!is_dense(t.dim(), sizes_.data(), strides_.data())) {
      copy_ = torch::stable::clone(torch::stable::contiguous(t));
      return;
    }
    const int64_t rows = t.dim() > 1 ? t.size(0) : 1;
    const Region region{static_cast<const unsigned char*>(data_), rows, t.numel() / rows * size_of_element()};
    regions.push_back(region);
    if (!counts_whole(region) && !call<bool>("aten::is_inference", t)) version_ = call<int64_t>("aten::_version", t);
  }

  // Whether `t` lies in the same place and nothing but its contents can have changed.
  bool is(const Tensor& t) const {
    if (t.const_data_ptr() != data_ || t.scalar_type() != dtype_ || t.dim() != static_cast<int64_t>(sizes_.size()) ||
        !std::equal(sizes_.begin(), sizes_.end(), t.sizes().begin()) ||
        !std::equal(strides_.begin(), strides_.end(), t.strides().begin()) || storage_bytes(t) != bytes_) {
      return false;
    }
    if (version_ != kUnversioned &&
        (call<bool>("aten::is_inference", t) || call<int64_t>("aten::_version", t) != version_))
      return false;
    if (!copy_) return true;
    const Tensor now = torch::stable::contiguous(t);
    return std::memcmp(now.const_data_ptr(), copy_->const_data_ptr(),
                       static_cast<size_t>(t.numel() * size_of_element())) == 0;
  }

  const void* data() const { return data_; }

 private:
  static constexpr int64_t kUnversioned = -1;

  int64_t size_of_element() const { return static_cast<int64_t>(alive_.element_size()); }

  Tensor alive_;  // keeps the storage, so that no other tensor gets its address
  const void* data_;
  int64_t bytes_;  // size of the storage
  ScalarType dtype_;
  std::vector<int64_t> sizes_, strides_;
  int64_t version_ = kUnversioned;
  OptionalTensor copy_;  // of a tensor with gaps
};

std::atomic<int64_t> packings{0};

// Packed weights, and the state of the tensors that they were made of.
class Packing {
 public:
  // pack() returns the packed weights.
  template <class Pack>
  Packing(const char* op, const Tensors& tensors, const std::vector<double>& eps, const Pack& pack) : eps_(eps) {
    // The state is recorded before the weights are read, so that the next call sees a write in between.
    for (const OptionalTensor& t : tensors) {
      watched_.push_back(t ? std::optional<Watched>(std::in_place, op, *t, regions_) : std::nullopt);
    }
    fingerprint_ = digest();
    packed_ = pack();
    ++packings;
  }

  // Whether these tensors and epsilons were packed, unless their contents have changed.
  bool is_of(const Tensors& tensors, const std::vector<double>& eps) const {
    if (tensors.size() != watched_.size() || eps != eps_) return false;
    for (size_t i = 0; i < tensors.size(); ++i) {
      if (tensors[i].has_value() != watched_[i].has_value() || (tensors[i] && !watched_[i]->is(*tensors[i])))
        return false;
    }
    return true;
  }

  // Whether the contents have not changed. Only after is_of(): else the memory may not be there any more.
  bool holds() const { return digest() == fingerprint_; }

  // Whether a tensor of both lies in the same place, so that `other` is of parameters that have changed since.
  bool succeeds(const Packing& other) const {
    const auto same = [](const auto& a, const auto& b) { return a && b && a->data() == b->data(); };
    return std::ranges::equal(watched_, other.watched_, [](const auto& a, const auto& b) { return !a == !b; }) &&
           std::inner_product(watched_.begin(), watched_.end(), other.watched_.begin(), false, std::logical_or<>(),
                              same);
  }

  const Tensor& packed() const { return packed_; }

 private:
  uint64_t digest() const { return fingerprint(regions_.data(), static_cast<int64_t>(regions_.size())); }

  std::vector<double> eps_;
  std::vector<std::optional<Watched>> watched_;
  std::vector<Region> regions_;
  uint64_t fingerprint_ = 0;
  Tensor packed_;
};

// ------------------------------------------------------------------------------------------------------------- caches

// Packings by the name of a cache. A name may have several: a program that was loaded twice uses the same names for
// different tensors.
class Caches {
 public:
  using Packings = std::vector<std::shared_ptr<const Packing>>;

  Packings of(const std::string& name) {
    const std::scoped_lock lock(mutex_);
    const auto known = by_name_.find(name);
    return known == by_name_.end() ? Packings() : known->second;
  }

  void add(const std::string& name, std::shared_ptr<const Packing> packing) {
    Packings dropped;  // destroyed without the lock: a tensor that dies may wait for Python's lock
    const std::scoped_lock lock(mutex_);
    if (!by_name_.contains(name)) {
      if (names_.size() >= kMostNames) {
        dropped.swap(by_name_[names_.front()]);
        by_name_.erase(names_.front());
        names_.pop_front();
      }
      names_.push_back(name);
    }
    Packings& all = by_name_[name];
    const auto stale =
        std::stable_partition(all.begin(), all.end(), [&](const auto& p) { return !packing->succeeds(*p); });
    const auto first = all.begin() + (stale - all.begin() >= kMostPackings);
    dropped.insert(dropped.end(), stale, all.end());
    dropped.insert(dropped.end(), all.begin(), first);
    all = {first, stale};
    all.push_back(std::move(packing));
  }

  void forget(const std::string& name) {
    Packings dropped;
    const std::scoped_lock lock(mutex_);
    const auto known = by_name_.find(name);
    if (known == by_name_.end()) return;
    dropped.swap(known->second);
    by_name_.erase(known);
    std::erase(names_, name);
  }

 private:
  static constexpr size_t kMostNames = 2048;
  static constexpr int64_t kMostPackings = 4;  // of one name

  std::mutex mutex_;
  std::unordered_map<std::string, Packings> by_name_;
  std::deque<std::string> names_;  // the oldest first
};

// Never destroyed: at the end of a process torch may be gone first.
Caches& caches() {
  static Caches* const all = new Caches;
  return *all;
}

// A check of a packing's contents, which runs while other threads already compute with it.
class ContentsCheck {
 public:
  explicit ContentsCheck(const Packing& packing) : packing_(packing) {
    set_alongside({[](void* data) { static_cast<ContentsCheck*>(data)->run(); }, this});
  }
  ~ContentsCheck() { set_alongside({}); }
  ContentsCheck(const ContentsCheck&) = delete;
  ContentsCheck& operator=(const ContentsCheck&) = delete;

  bool held() {
    if (!done_) run();  // the operator had nothing to compute
    return held_;
  }

 private:
  void run() {
    held_ = packing_.holds();
    done_ = true;
  }

  const Packing& packing_;
  bool done_ = false, held_ = false;
};

// run(packed weights) with weights that are up to date.
template <class Pack, class Run>
auto with_packed(const char* op, const std::string& cache, const Tensors& tensors, const std::vector<double>& eps,
                 const Pack& pack, const Run& run) {
  const std::string name = cache + " " + op;
  for (const auto& known : caches().of(name)) {
    if (!known->is_of(tensors, eps)) continue;
    ContentsCheck check(*known);
    auto y = run(known->packed());
    if (check.held()) return y;
    break;
  }
  const auto made = std::make_shared<const Packing>(op, tensors, eps, pack);
  caches().add(name, made);
  return run(made->packed());
}

// ------------------------------------------------------------------------------------------------------------ packing

// The tensors of one convolution in the operators' lists; see ConvNorm in mnv2_fused/_core/specs.py.
enum : size_t { kWeight, kBias, kGamma, kBeta, kMean, kVar, kConvTensors };

Tensor as_floats(const Tensor& t) { return torch::stable::contiguous(torch::stable::to(t, ScalarType::Float)); }

struct Folded {
  OptionalTensor weight, bias;  // nothing if there is no such convolution
};

// Folds the batch norm of convolution i into it, in float64, as fold_bn() in mnv2_fused/_core/fold.py.
Folded fold(const char* op, const Tensors& tensors, const std::vector<double>& eps, size_t i) {
  const OptionalTensor* const six = &tensors[kConvTensors * i];
  if (!six[kWeight]) return {};
  Tensor from = as_floats(*six[kWeight]);
  MNV2_CHECK(from.dim() > 0, op, "a convolution's weight must have dimensions, got ", describe(from));
  const int64_t rows = from.size(0), row = rows > 0 ? from.numel() / rows : 0;
  const auto vector = [&](size_t which) -> OptionalTensor {
    if (!six[which]) return std::nullopt;
    MNV2_CHECK(six[which]->dim() == 1 && six[which]->size(0) == rows, op, "a vector of convolution ", i,
               " must have shape (", rows, "), got ", describe(*six[which]));
    return as_floats(*six[which]);
  };
  const OptionalTensor bias = vector(kBias), gamma = vector(kGamma), beta = vector(kBeta), mean = vector(kMean),
                       var = vector(kVar);
  const auto at = [](const OptionalTensor& t, int64_t c, double missing) {
    return t ? static_cast<double>(t->const_data_ptr<float>()[c]) : missing;
  };
  MNV2_CHECK(mean.has_value() == var.has_value(), op, "mean and variance of convolution ", i,
             " must be given together");
  if (!mean && bias) return {from, bias};
  Tensor shift = empty({rows}, ScalarType::Float, false);
  float* const shifts = shift.mutable_data_ptr<float>();
  if (!mean) {
    std::fill_n(shifts, rows, 0.f);
    return {from, shift};
  }
  Tensor weight = empty({from.sizes().begin(), from.sizes().end()}, ScalarType::Float, false);
  const float* const w = from.const_data_ptr<float>();
  float* const folded = weight.mutable_data_ptr<float>();
  for (int64_t c = 0; c < rows; ++c) {
    double scale = 1 / std::sqrt(at(var, c, 0) + eps[i]);
    if (gamma) scale *= at(gamma, c, 1);
    double offset = (at(bias, c, 0) - at(mean, c, 0)) * scale;
    if (beta) offset += at(beta, c, 0);
    shifts[c] = static_cast<float>(offset);
    for (int64_t k = c * row; k < (c + 1) * row; ++k) folded[k] = static_cast<float>(w[k] * scale);
  }
  return {weight, shift};
}

// `tensors` and `eps` must be of `count` convolutions, or of a multiple of that.
void check_convolutions(const char* op, const Tensors& tensors, const std::vector<double>& eps, size_t count,
                        bool multiple = false) {
  MNV2_CHECK(tensors.size() == kConvTensors * eps.size() && !eps.empty() &&
                 (multiple ? eps.size() % count == 0 : eps.size() == count),
             op, "tensors and eps must have 6 tensors and 1 value for each of ", count, " convolutions, got ",
             tensors.size(), " and ", eps.size());
}

Tensor given(const char* op, const OptionalTensor& t) {
  MNV2_CHECK(t.has_value(), op, "a convolution that this unit needs is missing in tensors");
  return *t;
}

Tensor pack_block_at(const char* op, const Tensors& tensors, const std::vector<double>& eps, size_t i) {
  const Folded expand = fold(op, tensors, eps, i), depthwise = fold(op, tensors, eps, i + 1),
               project = fold(op, tensors, eps, i + 2);
  return pack_block_op(expand.weight, expand.bias, given(op, depthwise.weight), *depthwise.bias,
                       given(op, project.weight), *project.bias, ScalarType::Float);
}

Tensor pack_dense_at(const char* op, const Tensors& tensors, const std::vector<double>& eps, size_t i) {
  const Folded conv = fold(op, tensors, eps, i);
  return pack_dense_op(given(op, conv.weight), *conv.bias, ScalarType::Float);
}

Tensor pack_head_at(const char* op, const Tensors& tensors, const std::vector<double>& eps, size_t i, size_t j) {
  const Folded conv = fold(op, tensors, eps, i), classifier = fold(op, tensors, eps, j);
  return pack_head_op(given(op, conv.weight), *conv.bias, given(op, classifier.weight), *classifier.bias,
                      ScalarType::Float);
}

// Each unit of a network has three places for convolutions: kind_at() in mnv2_fused/_core/specs.py.
Tensor pack_units(const char* op, const Tensors& tensors, const std::vector<double>& eps) {
  const auto is_there = [&](size_t i) { return tensors[kConvTensors * i].has_value(); };
  std::vector<Tensor> packed;
  for (size_t i = 0; i < eps.size(); i += 3) {
    if (is_there(i + 1)) {
      packed.push_back(pack_block_at(op, tensors, eps, i));
    } else if (is_there(i + 2)) {
      packed.push_back(pack_head_at(op, tensors, eps, i, i + 2));
    } else {
      packed.push_back(pack_dense_at(op, tensors, eps, i));
    }
  }
  return pack_network(packed);
}

// ---------------------------------------------------------------------------------------------------------- operators

Tensor channels_last(const char* op, const Tensor& x) {
  check_activation(op, x);
  return torch::stable::contiguous(x, torch::headeronly::MemoryFormat::ChannelsLast);
}

Tensor cached_inverted_residual(const Tensor& x, const Tensors& tensors, const std::string& cache,
                                const std::vector<double>& eps, const std::vector<int64_t>& block,
                                const std::vector<double>& bounds) {
  const char* op = "cached_inverted_residual";
  check_convolutions(op, tensors, eps, 3);
  const Tensor map = channels_last(op, x);
  return with_packed(
      op, cache, tensors, eps, [&] { return pack_block_at(op, tensors, eps, 0); },
      [&](const Tensor& packed) { return inverted_residual(map, packed, block, bounds, false); });
}

Tensor cached_dense(const Tensor& x, const Tensors& tensors, const std::string& cache, const std::vector<double>& eps,
                    const std::vector<int64_t>& fields, const std::vector<double>& bounds) {
  const char* op = "cached_dense";
  check_convolutions(op, tensors, eps, 1);
  return with_packed(
      op, cache, tensors, eps, [&] { return pack_dense_at(op, tensors, eps, 0); },
      [&](const Tensor& packed) { return dense(x, packed, fields, bounds, false, std::nullopt); });
}

Tensor cached_head(const Tensor& x, const Tensors& tensors, const std::string& cache, const std::vector<double>& eps,
                   const std::vector<int64_t>& fields, const std::vector<double>& bounds) {
  const char* op = "cached_head";
  check_convolutions(op, tensors, eps, 2);
  const Tensor map = channels_last(op, x);
  return with_packed(
      op, cache, tensors, eps, [&] { return pack_head_at(op, tensors, eps, 0, 1); },
      [&](const Tensor& packed) { return head(map, packed, fields, bounds, false); });
}

std::vector<Tensor> cached_network(const Tensor& x, const Tensors& tensors, const std::string& cache,
                                   const std::vector<double>& eps, const std::string& units,
                                   const std::string& bounds) {
  const char* op = "cached_network";
  check_convolutions(op, tensors, eps, 3, true);
  return with_packed(
      op, cache, tensors, eps, [&] { return pack_units(op, tensors, eps); },
      [&](const Tensor& packed) { return network(x, packed, units, bounds, false); });
}

}  // namespace

void cpu_forget(const std::string& cache) {
  for (const char* op : {"cached_inverted_residual", "cached_dense", "cached_head", "cached_network"}) {
    caches().forget(cache + " " + op);
  }
}
int64_t cpu_packings() { return packings; }

STABLE_TORCH_LIBRARY_IMPL(mnv2_fused, CPU, m) {
  m.impl("cached_inverted_residual", TORCH_BOX(&cached_inverted_residual));
  m.impl("cached_dense", TORCH_BOX(&cached_dense));
  m.impl("cached_head", TORCH_BOX(&cached_head));
  m.impl("cached_network", TORCH_BOX(&cached_network));
  m.impl("cached_inverted_residual_grad", TORCH_BOX(&cached_inverted_residual));
  m.impl("cached_dense_grad", TORCH_BOX(&cached_dense));
  m.impl("cached_head_grad", TORCH_BOX(&cached_head));
  m.impl("cached_network_grad", TORCH_BOX(&cached_network));
}

}  // namespace mnv2
