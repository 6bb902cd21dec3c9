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

// All of the loops below are inlined into functions for different instruction sets.
#define MNV2_INLINE inline __attribute__((always_inline))

uint64_t read(const unsigned char* p, int64_t bytes) {
  uint64_t word = 0;
  std::memcpy(&word, p, static_cast<size_t>(bytes));
  return word;
}

// The last forward read this memory, and by now it is in no cache. Prefetching many lines hides the latency.
MNV2_INLINE void fetch(const unsigned char* p) { __builtin_prefetch(p); }

using Words = uint64_t __attribute__((vector_size(32)));

// The digest of lines so far: 16 independent chains, a line in 8 of them. A step is a bijection of a chain's state, so
// a change of any single word changes its chain.
struct Chains {
  Words hash[4] = {{1, 2, 3, 4}, {5, 6, 7, 8}, {9, 10, 11, 12}, {13, 14, 15, 16}};

  static MNV2_INLINE void mix(Words& chain, const Words& words) {
    chain ^= words;
    chain += chain << 21;
    chain = chain << 29 | chain >> 35;
  }
  template <int half>
  MNV2_INLINE void line(const unsigned char* p) {
    for (int i = 0; i < 2; ++i) {
      Words words;
      std::memcpy(&words, p + 32 * i, sizeof(words));
      mix(hash[2 * half + i], words);
    }
  }
  MNV2_INLINE void whole(const unsigned char* p, int64_t bytes) {
    for (; bytes >= 2 * kLine; p += 2 * kLine, bytes -= 2 * kLine) {
      fetch(p + kFetchAhead * kLine);
      fetch(p + (kFetchAhead + 1) * kLine);
      line<0>(p);
      line<1>(p + kLine);
    }
    if (bytes >= kLine) {
      line<0>(p);
      p += kLine;
      bytes -= kLine;
    }
    for (; bytes > 0; p += 8, bytes -= 8) mix(hash[2], Words{read(p, std::min<int64_t>(bytes, 8))});
  }
  MNV2_INLINE void diagonal(const Region& r);
  uint64_t digest() const {
    uint64_t digest = 0;
    for (const Words& words : hash) {
      for (int i = 0; i < 4; ++i) {
        digest = (digest ^ words[i]) * 0x9e3779b97f4a7c15u;
        digest ^= digest >> 32;
      }
    }
    return digest;
  }
};

// Walks along a diagonal that wraps around after the last row and after the last column of lines.
struct Diagonal {
  const Region& r;
  int64_t row = 0, column = 0;

  static MNV2_INLINE int64_t columns(const Region& r) { return (r.row_bytes + kLine - 1) / kLine; }
  MNV2_INLINE const unsigned char* next() {
    const unsigned char* line = r.data + row * r.row_bytes + std::min(column * kLine, r.row_bytes - kLine);
    if (++row == r.rows) row = 0;
    if (++column == columns(r)) column = 0;
    return line;
  }
};

// Reads one cache line in every row and in every column of lines, and the region's last bytes.
MNV2_INLINE void Chains::diagonal(const Region& r) {
  const int64_t steps = std::max(r.rows, Diagonal::columns(r));
  Diagonal ahead{r}, here{r};
  for (int64_t i = 0; i < kFetchAhead; ++i) fetch(ahead.next());
  for (int64_t step = 0; step < steps; step += 2) {
    fetch(ahead.next());
    fetch(ahead.next());
    line<0>(here.next());
    line<1>(here.next());
  }
  line<0>(r.data + r.rows * r.row_bytes - kLine);
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

namespace {

MNV2_INLINE uint64_t digest_of(const Region* regions, int64_t count) {
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

#ifdef __x86_64__
__attribute__((target("avx2"))) uint64_t digest_avx2(const Region* regions, int64_t count) {
  return digest_of(regions, count);
}
#endif

}  // namespace

uint64_t fingerprint(const Region* regions, int64_t count) {
#ifdef __x86_64__
  static const bool avx2 = __builtin_cpu_supports("avx2");
  if (avx2) return digest_avx2(regions, count);
#endif
  return digest_of(regions, count);
}

}  // namespace mnv2
