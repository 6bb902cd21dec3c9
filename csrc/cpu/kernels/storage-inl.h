// Sources, sinks and packed weights as the floats that this family of kernels computes with. The only kernel file that
// knows how values are stored. Included once per ISA.
#pragma once

#include "../storage.h"

namespace mnv2 {
namespace {

inline const float* weights_of(const void* packed) { return static_cast<const float*>(packed); }

// The first `count` elements: in place if they are floats, else widened into `scratch`.
inline const float* read(Source s, int64_t count, float* scratch) {
  if (s.dtype == DType::kFloat32) return static_cast<const float*>(s.data);
  widen(s.dtype, s.data, scratch, count);
  return scratch;
}

// Rows of floats, `row` floats apart.
struct ReadRows {
  const float* data;
  int64_t row;
};

// The first `count` elements of each of `rows` rows that lie source_row elements apart: as read().
inline ReadRows read_rows(Source s, int64_t source_row, int64_t rows, int64_t count, float* scratch) {
  if (s.dtype == DType::kFloat32) return {static_cast<const float*>(s.data), source_row};
  for (int64_t i = 0; i < rows; ++i) read(at(s, i * source_row), count, scratch + i * count);
  return {scratch, count};
}

// Copies `count` elements that lie `step` apart to `out`, `out_step` floats apart.
inline void gather(Source s, int64_t step, int64_t count, float* out, int64_t out_step) {
  if (s.dtype == DType::kFloat32) {
    const float* from = static_cast<const float*>(s.data);
    for (int64_t i = 0; i < count; ++i) out[i * out_step] = from[i * step];
  } else {
    for (int64_t i = 0; i < count; ++i) out[i * out_step] = load_element(s.dtype, s.data, i * step);
  }
}

// Copies the first `count` elements.
inline void copy(Source s, int64_t count, float* out) {
  const float* from = read(s, count, out);
  if (from == out) return;
  for (int64_t i = 0; i < count; ++i) out[i] = from[i];
}

// The floats that a kernel writes for a sink, in rows: the sink's own memory if it holds floats, else scratch, which
// finish() narrows into the sink.
class Draft {
 public:
  // `sink_row`, `scratch_row`: elements from one row to the next.
  Draft(Sink sink, int64_t sink_row, float* scratch, int64_t scratch_row)
      : data(in_place(sink) ? static_cast<float*>(sink.data) : scratch),
        row(in_place(sink) ? sink_row : scratch_row),
        sink_(sink),
        sink_row_(sink_row) {}
  Draft(Sink sink, float* scratch) : Draft(sink, 0, scratch, 0) {}  // of a single row

  // All rows, the first `count` elements of each.
  void finish(int64_t count, int64_t rows = 1) const {
    if (in_place(sink_)) return;
    for (int64_t i = 0; i < rows; ++i) narrow(sink_.dtype, data + i * row, at(sink_, i * sink_row_).data, count);
  }

  float* const data;
  const int64_t row;

 private:
  static bool in_place(Sink s) { return s.dtype == DType::kFloat32; }

  const Sink sink_;
  const int64_t sink_row_;
};

}  // namespace
}  // namespace mnv2
