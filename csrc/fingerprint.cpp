#include "fingerprint.h"

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

namespace mnv2 {
namespace {

// Regions up to this many bytes are read in full. That covers biases, batch norm and depthwise filters.
constexpr int64_t kWhole = 65536;
constexpr int64_t kLine = 64;
constexpr int64_t kFetchAhead = 24;

uint64_t rotate(uint64_t word, int bits) { return word << bits | word >> (64 - bits); }

uint64_t mix(uint64_t hash, uint64_t word, uint64_t other = 0) {
  return rotate((hash ^ word) + other, 29) * 0x9e3779b97f4a7c15u;
}

uint64_t read(const unsigned char* p, int64_t bytes = 8) {
  uint64_t word = 0;
  std::memcpy(&word, p, static_cast<size_t>(bytes));
  return word;
}

// The last forward read this memory, and by now it is in no cache. Prefetching many lines hides the latency.
void fetch(const unsigned char* p) { __builtin_prefetch(p); }

// Four independent chains hide the latency of the multiplications. A change of any single word changes its chain.
struct Chains {
  uint64_t hash[4] = {1, 2, 3, 4};

  void line(const unsigned char* p) {
    for (int i = 0; i < 4; ++i) hash[i] = mix(hash[i], read(p + 16 * i), rotate(read(p + 16 * i + 8), 21));
  }
  void whole(const unsigned char* p, int64_t bytes) {
    for (; bytes >= kLine; p += kLine, bytes -= kLine) {
      fetch(p + kFetchAhead * kLine);
      line(p);
    }
    for (; bytes > 0; p += 8, bytes -= 8) hash[0] = mix(hash[0], read(p, std::min<int64_t>(bytes, 8)));
  }
  void diagonal(const Region& r);
  uint64_t digest() const { return mix(mix(mix(hash[0], hash[1]), hash[2]), hash[3]); }
};

// Walks along a diagonal that wraps around after the last row and after the last column of lines.
struct Diagonal {
  const Region& r;
  int64_t row = 0, column = 0;

  static int64_t columns(const Region& r) { return (r.row_bytes + kLine - 1) / kLine; }
  const unsigned char* next() {
    const unsigned char* line = r.data + row * r.row_bytes + std::min(column * kLine, r.row_bytes - kLine);
    if (++row == r.rows) row = 0;
    if (++column == columns(r)) column = 0;
    return line;
  }
};

// Reads one cache line in every row and in every column of lines, and the region's last bytes.
void Chains::diagonal(const Region& r) {
  const int64_t steps = std::max(r.rows, Diagonal::columns(r));
  Diagonal ahead{r}, here{r};
  for (int64_t i = 0; i < kFetchAhead; ++i) fetch(ahead.next());
  for (int64_t step = 0; step < steps; ++step) {
    fetch(ahead.next());
    line(here.next());
  }
  line(r.data + r.rows * r.row_bytes - kLine);
}

}  // namespace

bool is_dense(int64_t dims, const int64_t* sizes, const int64_t* strides) {
  std::vector<std::pair<int64_t, int64_t>> by_stride;
  for (int64_t d = 0; d < dims; ++d) {
    if (sizes[d] != 1) by_stride.emplace_back(strides[d], sizes[d]);
  }
  const bool first_outermost = dims < 2 || sizes[0] == 1 || std::ranges::max(by_stride) == by_stride[0];
  std::ranges::sort(by_stride);
  int64_t expected = 1;
  for (const auto& [stride, size] : by_stride) {
    if (stride != expected) return false;
    expected *= size;
  }
  return first_outermost;
}

bool counts_whole(const Region& r) { return r.rows * r.row_bytes <= kWhole || r.row_bytes < kLine; }

uint64_t fingerprint(const Region* regions, int64_t count) {
  Chains chains;
  for (int64_t i = 0; i < count; ++i) {
    const Region& r = regions[i];
    if (i + 2 < count) {
      const Region& soon = regions[i + 2];
      for (int64_t l = 0; l < std::min<int64_t>(kFetchAhead, soon.rows * soon.row_bytes / kLine + 1); ++l)
        fetch(soon.data + l * kLine);
    }
    if (counts_whole(r)) {
      chains.whole(r.data, r.rows * r.row_bytes);
    } else {
      chains.diagonal(r);
    }
  }
  return chains.digest();
}

}  // namespace mnv2
