// What lies in memory, in one number: tells in microseconds whether weights have changed. Neither Python nor torch
// appears here.
#pragma once

#include <cstdint>

#include "api.h"

namespace mnv2 {

// `rows` rows of `row_bytes` bytes each, dense.
struct Region {
  const unsigned char* data;
  int64_t rows, row_bytes;
};

// A 64-bit digest of the regions' contents. Small regions count whole. Of a large one each row, and each column of 64
// bytes, is read in at least one place: a write to all of a row or of a column changes the digest, a write to a few
// bytes may not.
MNV2_FUSED_API uint64_t fingerprint(const Region* regions, int64_t count);
MNV2_FUSED_API bool counts_whole(const Region& region);

}  // namespace mnv2
