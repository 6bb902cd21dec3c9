// A digest of memory contents: tells in microseconds whether weights have changed. Free of Python and torch.
#pragma once

#include <cstdint>

#include "api.h"

namespace mnv2 {

// `rows` rows of `row_bytes` bytes each, dense.
struct Region {
  const unsigned char* data;
  int64_t rows, row_bytes;
};

// A 64-bit digest of the regions' contents. Regions of up to 64 KiB, or with rows below 64 bytes, are read in full. Any
// other is sampled: one cache line (64 bytes) in every row and in every column of lines. A write to a whole row or
// column changes the digest; a write to a few bytes may not.
MNV2_FUSED_API uint64_t fingerprint(const Region* regions, int64_t count);
// Whether a tensor has no gaps and its first dimension is outermost, so that its memory is one region.
MNV2_FUSED_API bool is_dense(int64_t dims, const int64_t* sizes, const int64_t* strides);
// Whether the fingerprint reads all of the region.
MNV2_FUSED_API bool counts_whole(const Region& region);

}  // namespace mnv2
