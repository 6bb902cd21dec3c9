// Device code that all kernels share: operands of the tensor cores, products of a chunk, reads of pixels.
#pragma once

#include "args.h"
#include "device.cuh"

namespace mnv2 {
namespace cuda {

using namespace device;

// Arithmetic by storage type. kOperand: registers of four neighbouring values.
template <class T>
struct Math16 {
  using Value = T;
  static constexpr int kBytes = 2, kOperand = 2;
};
struct HalfMath : Math16<Half> {
  static constexpr int kFilterBytes = 2;
};
struct BFloat16Math : Math16<BFloat16> {
  static constexpr int kFilterBytes = 4;
};
// kExact: values are multiplied as two tf32 parts, four products for one, which is fp32 but for the last bit. Otherwise
// they are rounded to tf32.
template <bool kExact_>
struct FloatMath {
  using Value = float;
  static constexpr int kBytes = 4, kOperand = 4, kFilterBytes = 4;
  static constexpr bool kExact = kExact_;
};

// Divides numbers from 0 to 2^22 with two roundings of 2^-24 each, of a quotient that is at least 0.5 / by from an
// integer. Several times as fast as integers' own division.
struct Divisor {
  float inverse;  // 1 / by

  MNV2_DEVICE static Divisor of(int by) { return {1.f / static_cast<float>(by)}; }
  MNV2_DEVICE int quotient(int i) const { return static_cast<int>((static_cast<float>(i) + 0.5f) * inverse); }
};

// Four values along a sum, of one row or column.
template <class M>
struct Operand {
  uint32_t r[M::kOperand];
};

// The operands in 16 bytes.
template <class M>
MNV2_DEVICE void set_operands(const Four& v, Operand<M>* to) {
  if constexpr (M::kOperand == 2) {
    to[0] = {v.x, v.y}, to[1] = {v.z, v.w};
  } else {
    to[0] = {v.x, v.y, v.z, v.w};
  }
}
template <class M>
MNV2_DEVICE void load_operands(const unsigned char* from, Operand<M>* to) {
  set_operands<M>(*reinterpret_cast<const Four*>(from), to);
}

// Rows g and g + 8 of a group of 16 values, as they are multiplied.
template <class M>
struct Rows {
  Operand<M> first, second;

  MNV2_DEVICE void set(const Operand<M>& upper, const Operand<M>& lower) { first = upper, second = lower; }
};
template <>
struct Rows<FloatMath<true>> {
  uint32_t whole[2][4], rest[2][4];  // of either half of the group

  MNV2_DEVICE void set(const Operand<FloatMath<true>>& upper, const Operand<FloatMath<true>>& lower) {
    MNV2_UNROLL
    for (int i = 0; i < 8; ++i)
      split_tf32(bits_to_float((i % 2 ? lower : upper).r[i / 2]), whole[i / 4][i % 4], rest[i / 4][i % 4]);
  }
};

// d (16 x 8) = c + a b over a group of 16: rows g and g + 8 of a, column g of b. `last` orders an exact product after
// the previous one; otherwise the compiler overlaps too many and spills. c may be d.
template <class T, class M>
MNV2_DEVICE void multiply_16(float (&d)[4], const float (&c)[4], const Rows<M>& rows, const Operand<M>& b) {
  const uint32_t a[4] = {rows.first.r[0], rows.second.r[0], rows.first.r[1], rows.second.r[1]};
  mma16<T>(d, c, a, b.r);
}
MNV2_DEVICE void multiply(float (&d)[4], const float (&c)[4], const Rows<HalfMath>& rows, const Operand<HalfMath>& b,
                          float (&)[4]) {
  multiply_16<Half>(d, c, rows, b);
}
MNV2_DEVICE void multiply(float (&d)[4], const float (&c)[4], const Rows<BFloat16Math>& rows,
                          const Operand<BFloat16Math>& b, float (&)[4]) {
  multiply_16<BFloat16>(d, c, rows, b);
}
MNV2_DEVICE void multiply(float (&d)[4], const float (&first)[4], const Rows<FloatMath<false>>& rows,
                          const Operand<FloatMath<false>>& b, float (&)[4]) {
  MNV2_UNROLL
  for (int i = 0; i < 4; ++i) d[i] = first[i];
  MNV2_UNROLL
  for (int s = 0; s < 4; s += 2) {
    const uint32_t values[4] = {rows.first.r[s], rows.second.r[s], rows.first.r[s + 1], rows.second.r[s + 1]};
    uint32_t a[4], c[2];
    MNV2_UNROLL
    for (int i = 0; i < 4; ++i) a[i] = to_tf32(bits_to_float(values[i]));
    MNV2_UNROLL
    for (int i = 0; i < 2; ++i) c[i] = to_tf32(bits_to_float(b.r[s + i]));
    mma8_tf32(d, a, c);
  }
}
MNV2_DEVICE uint32_t zero_if_infinite(uint32_t bits) { return (bits << 1) == 0xff000000u ? 0u : bits; }
MNV2_DEVICE void multiply(float (&d)[4], const float (&first)[4], const Rows<FloatMath<true>>& rows,
                          const Operand<FloatMath<true>>& b, float (&last)[4]) {
  MNV2_UNROLL
  for (int i = 0; i < 4; ++i) d[i] = first[i];
  MNV2_UNROLL
  for (int s = 0; s < 2; ++s) {
    uint32_t whole[2], rest[2], finite_a[4], finite[2];
    MNV2_UNROLL
    for (int i = 0; i < 2; ++i) split_tf32(bits_to_float(b.r[2 * s + i]), whole[i], rest[i]);
    // An infinite part times the other's rest would be NaN: the rest may be 0 or of the other sign.
    MNV2_UNROLL
    for (int i = 0; i < 4; ++i) finite_a[i] = zero_if_infinite(rows.whole[s][i]);
    MNV2_UNROLL
    for (int i = 0; i < 2; ++i) finite[i] = zero_if_infinite(whole[i]);
    // Tensor cores cut off the bits that a sum cannot hold, at every step of a long one. So their sums are short, with
    // the small products first, and are added up here in order, rounded to nearest.
    float sums[4];
    MNV2_UNROLL
    for (int i = 0; i < 4; ++i) sums[i] = zero_after(last[i]);
    mma8_tf32(sums, rows.rest[s], rest);
    mma8_tf32(sums, rows.rest[s], finite);
    mma8_tf32(sums, finite_a, rest);
    mma8_tf32(sums, rows.whole[s], whole);
    MNV2_UNROLL
    for (int i = 0; i < 4; ++i) last[i] = d[i] += sums[i];
  }
}

// Rows of a tile in shared memory, `pitch` bytes apart, as operands: 16 rows and a group of 16 values at a time. In 16
// bits a lane has values 2 t, 2 t + 1, 2 t + 8 and 2 t + 9 of a row, otherwise 4 t to 4 t + 3.
template <class M>
struct TileRows {
  const unsigned char* at;
  int pitch;

  MNV2_DEVICE TileRows(const unsigned char* tile, int row_pitch, int lane) : pitch(row_pitch) {
    at = tile + (M::kBytes == 2 ? (lane & 15) * pitch + (lane & 16) : (lane >> 2) * pitch + (lane & 3) * 16);
  }
  MNV2_DEVICE void load(int m, Rows<M>& to) const {
    const unsigned char* const from = at + m * 16 * pitch;
    if constexpr (M::kBytes == 2) {
      uint32_t a[4];
      load_matrices(from, a);
      to.first = {a[0], a[2]}, to.second = {a[1], a[3]};
    } else {
      Operand<M> upper, lower;
      load_operands(from, &upper);
      load_operands(from + 8 * pitch, &lower);
      to.set(upper, lower);
    }
  }
  MNV2_DEVICE void next_group() { at += 16 * M::kBytes; }
};

// d (16 kM x 32) = first + a x weights over a group of 16. weights(i): this lane's operands in piece i of kBytes.
template <class M, int kM, class First, class Weights>
MNV2_DEVICE void multiply_group(float (&d)[kM][4][4], const First& first, const Rows<M> (&a)[kM],
                                const Weights& weights, float (&last)[4]) {
  constexpr int kPerLoad = 4 / M::kOperand;  // operands in 16 bytes
  MNV2_UNROLL
  for (int i = 0; i < 4; i += kPerLoad) {
    if constexpr (kPerLoad == 1) warp_barrier();  // else the compiler reads too far ahead and spills
    Operand<M> b[kPerLoad];
    set_operands<M>(weights(i / kPerLoad), b);
    MNV2_UNROLL
    for (int j = 0; j < kPerLoad; ++j) {
      MNV2_UNROLL
      for (int m = 0; m < kM; ++m) multiply(d[m][i + j], first(m, i + j), a[m], b[j], last);
    }
  }
}

// The pieces of a group at `from`, (kBytes, 32 lanes, 16 bytes) from this lane on.
struct Pieces {
  const unsigned char* from;

  MNV2_DEVICE Four operator()(int i) const { return *reinterpret_cast<const Four*>(from + i * 512); }
};

// d += rows x weights over `groups` groups. weights: a chunk's, (groups, kBytes, 32 lanes, 16 bytes).
template <class M, int kM, class From>
MNV2_DEVICE void multiply_chunk(float (&d)[kM][4][4], From rows, const unsigned char* weights, int groups, int lane) {
  const auto first = [&](int m, int tile) -> const float (&)[4] { return d[m][tile]; };
  weights += lane * 16;
  float last[4] = {};
  MNV2_NO_UNROLL
  for (int group = 0; group < groups; ++group) {
    Rows<M> a[kM];
    MNV2_UNROLL
    for (int m = 0; m < kM; ++m) rows.load(m, a[m]);
    multiply_group<M>(d, first, a, Pieces{weights}, last);
    weights += 512 * M::kBytes;
    rows.next_group();
  }
}

// The same with weights in memory that is far: those of the next group are on their way while one is multiplied.
template <class M, int kM, class From>
MNV2_DEVICE void multiply_far(float (&d)[kM][4][4], From rows, const unsigned char* weights, int groups, int lane) {
  const auto first = [&](int m, int tile) -> const float (&)[4] { return d[m][tile]; };
  Four next[M::kBytes];
  const auto fetch = [&](int group) {
    MNV2_UNROLL
    for (int i = 0; i < M::kBytes; ++i) next[i] = Pieces{weights + (group * M::kBytes) * 512 + lane * 16}(i);
  };
  fetch(0);
  float last[4] = {};
  MNV2_NO_UNROLL
  for (int group = 0; group < groups; ++group) {
    Four now[M::kBytes];
    MNV2_UNROLL
    for (int i = 0; i < M::kBytes; ++i) now[i] = next[i];
    if (group + 1 < groups) fetch(group + 1);
    Rows<M> a[kM];
    MNV2_UNROLL
    for (int m = 0; m < kM; ++m) rows.load(m, a[m]);
    multiply_group<M>(d, first, a, [&](int i) { return now[i]; }, last);
    rows.next_group();
  }
}

// d = bias + rows x weights, over at least one group. bias: the sums of a product without any group, for all its rows.
template <class M, int kM, class From>
MNV2_DEVICE void multiply_from(float (&d)[kM][4][4], const float (&bias)[4][4], From rows, const unsigned char* weights,
                               int groups, int lane) {
  if constexpr (M::kBytes == 2 && kM == 2) {
    const auto first = [&](int, int tile) -> const float (&)[4] { return bias[tile]; };
    float last[4] = {};
    Rows<M> a[kM];
    MNV2_UNROLL
    for (int m = 0; m < kM; ++m) rows.load(m, a[m]);
    multiply_group<M>(d, first, a, Pieces{weights + lane * 16}, last);
    rows.next_group();
    multiply_chunk<M>(d, rows, weights + 512 * M::kBytes, groups - 1, lane);
  } else {  // one loop, which spills less
    MNV2_UNROLL
    for (int i = 0; i < kM * 16; ++i) d[i / 16][i / 4 % 4][i % 4] = bias[i / 4 % 4][i % 4];
    multiply_chunk<M>(d, rows, weights, groups, lane);
  }
}

// Single values.
MNV2_DEVICE float to_float(Half value) { return unpack_first<Half>(value.bits); }
MNV2_DEVICE float to_float(BFloat16 value) { return unpack_first<BFloat16>(value.bits); }
MNV2_DEVICE float to_float(float value) { return value; }
MNV2_DEVICE void store_value(Half* to, float value) { to->bits = static_cast<uint16_t>(pack<Half>(value, 0.f)); }
MNV2_DEVICE void store_value(BFloat16* to, float value) {
  to->bits = static_cast<uint16_t>(pack<BFloat16>(value, 0.f));
}
MNV2_DEVICE void store_value(float* to, float value) { *to = value; }

// kCount (2, 4 or 8) neighbouring values to or from memory that is aligned to all of them, or to 16 bytes.
template <class T, int kCount>
MNV2_DEVICE void store_values(T* to, const float (&values)[kCount]) {
  constexpr int kWords = kCount * static_cast<int>(sizeof(T)) / 4;
  uint32_t words[kWords];
  MNV2_UNROLL
  for (int i = 0; i < kWords; ++i) {
    if constexpr (sizeof(T) == 4) {
      words[i] = float_to_bits(values[i]);
    } else {
      words[i] = pack<T>(values[2 * i], values[2 * i + 1]);
    }
  }
  if constexpr (kWords == 1) {
    *reinterpret_cast<uint32_t*>(to) = words[0];
  } else if constexpr (kWords == 2) {
    *reinterpret_cast<Two*>(to) = {words[0], words[1]};
  } else {
    MNV2_UNROLL
    for (int i = 0; i < kWords; i += 4)
      reinterpret_cast<Four*>(to)[i / 4] = {words[i], words[i + 1], words[i + 2], words[i + 3]};
  }
}

// kCount (2 or 4) neighbouring words from memory that is aligned to all of them.
template <int kCount>
MNV2_DEVICE void load_words(const int32_t* from, int32_t (&to)[kCount]) {
  if constexpr (kCount == 2) {
    const Two v = *reinterpret_cast<const Two*>(from);
    to[0] = static_cast<int32_t>(v.x), to[1] = static_cast<int32_t>(v.y);
  } else {
    const Four v = *reinterpret_cast<const Four*>(from);
    to[0] = static_cast<int32_t>(v.x), to[1] = static_cast<int32_t>(v.y);
    to[2] = static_cast<int32_t>(v.z), to[3] = static_cast<int32_t>(v.w);
  }
}

template <class T, int kCount>
MNV2_DEVICE void load_values(const T* from, float (&values)[kCount]) {
  constexpr int kWords = kCount * static_cast<int>(sizeof(T)) / 4;
  uint32_t words[kWords];
  if constexpr (kWords == 1) {
    words[0] = *reinterpret_cast<const uint32_t*>(from);
  } else if constexpr (kWords == 2) {
    const Two v = *reinterpret_cast<const Two*>(from);
    words[0] = v.x, words[1] = v.y;
  } else {
    MNV2_UNROLL
    for (int i = 0; i < kWords; i += 4) {
      const Four v = reinterpret_cast<const Four*>(from)[i / 4];
      words[i] = v.x, words[i + 1] = v.y, words[i + 2] = v.z, words[i + 3] = v.w;
    }
  }
  MNV2_UNROLL
  for (int i = 0; i < kCount; ++i) {
    if constexpr (sizeof(T) == 4) {
      values[i] = bits_to_float(words[i]);
    } else {
      values[i] = i % 2 ? unpack_second<T>(words[i / 2]) : unpack_first<T>(words[i / 2]);
    }
  }
}

// Two values, rounded and clamped. Rounding keeps the order of numbers, so values and bounds may be rounded before the
// clamp. kRelu: `least` is 0, in one instruction with the rounding.
template <class T, bool kRelu>
MNV2_DEVICE uint32_t clamped_pair(float first, float second, uint32_t least, uint32_t most) {
  return min_pair<T>(kRelu ? pack_relu<T>(first, second) : max_pair<T>(pack<T>(first, second), least), most);
}

// d = this lane's columns of a chunk's biases: 8 t to 8 t + 7, two of each tile.
template <int kM>
MNV2_DEVICE void set_bias(float (&d)[kM][4][4], const unsigned char* bias, int lane) {
  MNV2_UNROLL
  for (int i = 0; i < 4; ++i) {
    load_values(reinterpret_cast<const float*>(bias + lane % 4 * 64) + i * 4, d[0][i]);
    MNV2_UNROLL
    for (int j = 0; j < (kM - 1) * 4; ++j) d[1 + j / 4][i][j % 4] = d[0][i][j % 4];
  }
}

// The same from (channels) biases of an image; beyond them the sums do not count.
template <int kM>
MNV2_DEVICE void set_image_bias(float (&d)[kM][4][4], const float* bias, int channel, int channels, int lane) {
  const int first = channel + lane % 4 * 8;
  MNV2_UNROLL
  for (int i = 0; i < 8; ++i) {
    const float value = first + i < channels ? bias[first + i] : 0.f;
    MNV2_UNROLL
    for (int m = 0; m < kM; ++m) d[m][i / 2][i % 2] = d[m][i / 2][2 + i % 2] = value;
  }
}

// 16 bytes to shared memory value by value: the first `count` of them, then zeros.
template <class T>
MNV2_DEVICE void copy_values(unsigned char* to, const T* from, int count) {
  constexpr int kValues = 16 / static_cast<int>(sizeof(T));
  T values[kValues];
  MNV2_UNROLL
  for (int i = 0; i < kValues; ++i) {
    if (i < count)
      values[i] = load_shared_result(from + i);
    else
      values[i] = T{};
  }
  MNV2_UNROLL
  for (int i = 0; i < kValues; ++i) reinterpret_cast<T*>(to)[i] = values[i];
}

// 16 bytes of a pixel's row to shared memory: values first to first + 16 / sizeof(T) of `count`. Zeros beyond `count`,
// and if not `valid`. vectors: rows are aligned to 16 bytes, and the copy is asynchronous.
template <class T>
MNV2_DEVICE void copy_vector(unsigned char* to, const T* row, int first, int count, bool valid, bool vectors) {
  const bool inside = valid && first < count;
  const T* const from = row + (inside ? first : 0);
  if (vectors)
    copy_async(to, from, inside);
  else
    copy_values(to, from, inside ? count - first : 0);
}

}  // namespace cuda
}  // namespace mnv2
