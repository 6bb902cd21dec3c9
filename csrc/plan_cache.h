// A cache of plans by key. Torch-free.
#pragma once

#include <memory>
#include <mutex>
#include <utility>
#include <vector>

namespace mnv2 {

// Keeps the `most` newest plans. Key needs operator==. If several threads miss the same key at the same time, each
// makes the plan and one of them is kept.
template <class Key, class Plan>
class PlanCache {
 public:
  explicit PlanCache(size_t most) : most_(most) {}

  // The cached plan for `key`; on a miss the result of make().
  template <class Make>
  std::shared_ptr<const Plan> get(const Key& key, const Make& make) {
    {
      const std::scoped_lock lock(mutex_);
      if (std::shared_ptr<const Plan> known = find(key)) return known;
    }
    auto made = std::make_shared<const Plan>(make());
    const std::scoped_lock lock(mutex_);
    if (std::shared_ptr<const Plan> known = find(key)) return known;
    if (plans_.size() >= most_) plans_.erase(plans_.begin());
    plans_.emplace_back(key, made);
    return made;
  }

 private:
  std::shared_ptr<const Plan> find(const Key& key) const {
    for (auto known = plans_.rbegin(); known != plans_.rend(); ++known) {
      if (known->first == key) return known->second;
    }
    return nullptr;
  }

  const size_t most_;
  std::mutex mutex_;
  std::vector<std::pair<Key, std::shared_ptr<const Plan>>> plans_;
};

}  // namespace mnv2
