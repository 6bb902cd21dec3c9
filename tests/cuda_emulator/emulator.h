// The names of csrc/cuda/device.cuh for the host, so that the kernels themselves run there. With MNV2_CUDA_EMULATOR
// defined, include the kernel's header and
//
//   GuardedMemory x(bytes), y(bytes);  // global memory; any other memory works, but only this one detects overruns
//   launch({tiles, 1, batch}, 256, shared_bytes, Schedule::number(i), [&] { block_kernel<Half>(arguments); });
//
// It throws std::runtime_error, with the CTA, the thread and the line, if the hardware would hang, fault or do
// something undefined. A missing barrier or wait shows in results that are wrong under some schedules: run 0 to 11. For
// a function that Python calls, `return report([&] { launch(...); });`. One launch at a time; clusters run one after
// the other, so none may wait for another. Memory that kernels before it may still use is out of bounds for a CTA until
// one of its threads has waited for them.
#pragma once

#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <source_location>
#include <span>
#include <stdexcept>
#include <string>
#include <type_traits>

#define MNV2_DEVICE inline
#define MNV2_APART inline
#define MNV2_CONSTANT
#define MNV2_KERNEL(...) inline void
#define MNV2_UNROLL
#define MNV2_NO_UNROLL

namespace mnv2 {
namespace emulator {

struct Grid {
  int x, y, z;
  int cluster = 1;  // CTAs along z
  int first_x = 0;  // CTAs before this one are not run
};

// A thread runs until it returns or waits for others; then the next thread of its warp runs. Which order shows a fault
// depends on the fault.
struct Schedule {
  enum class Order { kAscending, kDescending, kShuffled };
  Order order;          // of CTAs, of warps and of the threads of a warp
  bool warp_at_a_time;  // a warp runs up to the next barrier() before the next warp runs; else to its next collective
  bool late_copies;     // copies are carried out when they are waited for; else at once
  bool bulk_copies;     // the hardware has them
  uint32_t seed;        // for kShuffled; if it is odd, shared memory is GuardedMemory `at_start`

  // 0 to 11 are all combinations of the first three, with shared memory guarded at either end, late copies of either
  // kind. Higher numbers shuffle with other seeds.
  static constexpr Schedule number(int i) {
    return {static_cast<Order>(i % 3), i / 3 % 2 == 0, i / 6 % 2 == 0, i / 2 % 2 == 0, static_cast<uint32_t>(i)};
  }
};

// `bytes` bytes, 16-byte aligned and zero at first, between two pages that nobody may touch. The second page comes
// right behind them or, with `at_start`, the first one right before.
class GuardedMemory {
 public:
  explicit GuardedMemory(size_t bytes, bool at_start = false);
  ~GuardedMemory();
  GuardedMemory(const GuardedMemory&) = delete;
  GuardedMemory& operator=(const GuardedMemory&) = delete;

  unsigned char* data() const { return data_; }
  size_t size() const { return size_; }
  void fill_with_nan(size_t from = 0) const;
  void allow(bool allowed) const;  // allows or forbids access, for whole pages

 private:
  unsigned char *pages_, *data_;
  size_t size_, page_bytes_;
};

// `body` calls the kernel: each thread calls it once. in_flight: memory that kernels before this one may still write or
// read; a CTA must not touch it before wait_for_previous_kernel().
void launch(Grid grid, int threads, size_t shared_bytes, Schedule schedule, const std::function<void()>& body,
            std::span<const GuardedMemory* const> in_flight = {});

// Null, or the message of the exception that `f` threw; valid until the next call.
const char* report(const std::function<void()>& f);

// ------------------------------------------------------------------------------------ for the names below

using Place = std::source_location;

enum class Collective {
  kBarrier,
  kClusterBarrier,
  kWarpBarrier,
  kShuffle,
  kMatrices,
  kMmaHalf,
  kMmaBFloat16,
  kMmaTf32
};

struct ShuffleOperands {
  float value;
  int mask;
  float result;
};
struct MatricesOperands {
  uint32_t row[4];  // as it is when its lane comes: that all lanes meet orders no accesses to memory
  uint32_t* to;
};
struct MmaOperands {
  float* d;
  const uint32_t *a, *b;
};

struct Current {
  int thread, block_x, block_y, block_z;
  unsigned char* shared;
};
inline Current current;

// Waits until all threads of the collective have reached this place of the kernel and its work is done.
void meet(Collective collective, void* operands, const Place& place);
[[noreturn]] void fail(const std::string& what, const Place& place);

void wait_for_previous();
// Where `own`, bytes in this CTA's shared memory, is in that of the cluster's CTA `z`.
const void* in_cta(const void* own, size_t bytes, int z, const Place& place);

void copy(void* to, const void* from, bool valid, const Place& place);
bool copies_in_bulk();
void start_arrival(const void* arrival, const Place& place);
void expect(const void* arrival, int bytes, const Place& place);
void copy_in_bulk(void* to, const void* from, int bytes, const void* arrival, const Place& place);
void wait_for_arrival(const void* arrival, bool odd, const Place& place);
void commit_copies();
void wait_for_copies(int pending);

constexpr uint32_t kNan = 0x7fffffff, kHalfNan = 0x7fff;  // the NaNs that the hardware returns

inline float half_to_float(uint32_t bits) {
  const uint32_t sign = (bits & 0x8000) << 16, magnitude = bits & 0x7fff;
  if (magnitude >= 0x7c00) return std::bit_cast<float>(sign | 0x7f800000 | magnitude << 13);
  return std::copysign(std::bit_cast<float>(magnitude << 13) * 0x1p112f, std::bit_cast<float>(sign));
}

inline uint32_t half_from(double value) {
  if (value != value) return kHalfNan;
  const uint32_t sign = std::signbit(value) ? 0x8000 : 0;
  value = std::fabs(value);
  if (value >= 65520) return sign | 0x7c00;
  if (value < 0x1p-14) return sign | static_cast<uint32_t>(value * 0x1p24 + 0x1p52 - 0x1p52);
  // Subtracts the difference of the exponent biases, then rounds.
  const uint64_t bits = std::bit_cast<uint64_t>(value) - (uint64_t{1023 - 15} << 52), odd = bits >> 42 & 1;
  return sign | static_cast<uint32_t>((bits + (uint64_t{1} << 41) - 1 + odd) >> 42);
}

inline uint32_t bfloat16_from(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  return value != value ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

}  // namespace emulator

namespace device {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};
struct alignas(8) Two {
  uint32_t x, y;
};
struct alignas(16) Four {
  uint32_t x, y, z, w;
};

inline int thread_index() { return emulator::current.thread; }
inline int block_index_x() { return emulator::current.block_x; }
inline int block_index_y() { return emulator::current.block_y; }
inline int block_index_z() { return emulator::current.block_z; }
inline unsigned char* shared_memory() { return emulator::current.shared; }

inline void barrier(const emulator::Place& place = emulator::Place::current()) {
  emulator::meet(emulator::Collective::kBarrier, nullptr, place);
}
inline void warp_barrier(const emulator::Place& place = emulator::Place::current()) {
  emulator::meet(emulator::Collective::kWarpBarrier, nullptr, place);
}
constexpr bool kHasClusters = true;
inline void cluster_barrier(const emulator::Place& place = emulator::Place::current()) {
  emulator::meet(emulator::Collective::kClusterBarrier, nullptr, place);
}
inline void load_from_block(const float* own, int z, float (&to)[4],
                            const emulator::Place& place = emulator::Place::current()) {
  if (reinterpret_cast<uintptr_t>(own) % 16 != 0) emulator::fail("load_from_block from an unaligned address", place);
  std::memcpy(to, emulator::in_cta(own, sizeof to, z, place), sizeof to);
}
inline float shuffle_xor(float value, int mask, const emulator::Place& place = emulator::Place::current()) {
  emulator::ShuffleOperands operands{value, mask, 0};
  if (mask < 0 || mask > 31) emulator::fail("shuffle_xor with mask " + std::to_string(mask), place);
  emulator::meet(emulator::Collective::kShuffle, &operands, place);
  return operands.result;
}

inline uint32_t ordered_add(uint32_t* address, uint32_t value) {
  const uint32_t before = *address;
  *address += value;
  return before;
}
inline void wait_for_previous_kernel() { emulator::wait_for_previous(); }
inline void allow_next_kernel() {}

inline void copy_async(void* to, const void* from, bool valid,
                       const emulator::Place& place = emulator::Place::current()) {
  emulator::copy(to, from, valid, place);
}
inline void copy_async_commit() { emulator::commit_copies(); }
template <int kPending>
inline void copy_async_wait() {
  emulator::wait_for_copies(kPending);
}

using Arrival = uint64_t;
inline bool bulk_copies() { return emulator::copies_in_bulk(); }
inline void start_arrival(Arrival* arrival, const emulator::Place& place = emulator::Place::current()) {
  emulator::start_arrival(arrival, place);
}
inline void expect_bytes(Arrival* arrival, int bytes, const emulator::Place& place = emulator::Place::current()) {
  emulator::expect(arrival, bytes, place);
}
inline void copy_bulk(void* to, const void* from, int bytes, Arrival* arrival,
                      const emulator::Place& place = emulator::Place::current()) {
  emulator::copy_in_bulk(to, from, bytes, arrival, place);
}
inline void wait_for_arrival(Arrival* arrival, bool odd, const emulator::Place& place = emulator::Place::current()) {
  emulator::wait_for_arrival(arrival, odd, place);
}

inline void load_matrices(const unsigned char* row, uint32_t (&to)[4],
                          const emulator::Place& place = emulator::Place::current()) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) emulator::fail("load_matrices from an unaligned address", place);
  emulator::MatricesOperands operands{{}, to};
  std::memcpy(operands.row, row, sizeof operands.row);
  emulator::meet(emulator::Collective::kMatrices, &operands, place);
}
template <int kCount>
inline void load_constants(const float* from, float (&values)[kCount]) {
  std::memcpy(values, from, sizeof values);
}
template <class T>
inline T load_shared_result(const T* from) {
  return *from;
}

template <class T>
inline T forgotten(T value) {
  return value;
}
inline float zero_after(float) { return 0; }
inline float bits_to_float(uint32_t bits) { return std::bit_cast<float>(bits); }
inline uint32_t float_to_bits(float value) { return std::bit_cast<uint32_t>(value); }
inline float fma(float a, float b, float c) { return std::fma(a, b, c); }

// -0 is less than 0.
inline float max_or_nan(float a, float b) {
  if (a != a || b != b) return bits_to_float(emulator::kNan);
  return a > b || (a == b && !std::signbit(a)) ? a : b;
}
inline float min_or_nan(float a, float b) {
  if (a != a || b != b) return bits_to_float(emulator::kNan);
  return a < b || (a == b && std::signbit(a)) ? a : b;
}
inline float clamp(float value, float lo, float hi) { return min_or_nan(max_or_nan(value, lo), hi); }

template <class T>
inline uint32_t pack(float first, float second);
template <>
inline uint32_t pack<Half>(float first, float second) {
  return emulator::half_from(first) | emulator::half_from(second) << 16;
}
template <>
inline uint32_t pack<BFloat16>(float first, float second) {
  return emulator::bfloat16_from(first) | emulator::bfloat16_from(second) << 16;
}
template <class T>
inline uint32_t pack_relu(float first, float second) {
  return pack<T>(max_or_nan(first, 0), max_or_nan(second, 0));
}
inline uint32_t to_tf32(float value) {
  return value != value ? emulator::kNan : (float_to_bits(value) + 0x1000) & 0xffffe000;
}
inline void split_tf32(float value, uint32_t& whole, uint32_t& rest) {
  whole = to_tf32(value);
  rest = std::isinf(bits_to_float(whole)) ? 0 : to_tf32(value - bits_to_float(whole));
}

template <class T>
inline float unpack_first(uint32_t packed);
template <class T>
inline float unpack_second(uint32_t packed);
template <>
inline float unpack_first<Half>(uint32_t packed) {
  return emulator::half_to_float(packed & 0xffff);
}
template <>
inline float unpack_second<Half>(uint32_t packed) {
  return emulator::half_to_float(packed >> 16);
}
template <>
inline float unpack_first<BFloat16>(uint32_t packed) {
  return bits_to_float(packed << 16);
}
template <>
inline float unpack_second<BFloat16>(uint32_t packed) {
  return bits_to_float(packed & 0xffff0000);
}

// The product is exact in double. If the sum is not, it is nowhere near the middle of two halves.
inline uint32_t fma_half2(uint32_t a, uint32_t b, uint32_t c) {
  const auto one = [](double x, double y, double z) { return emulator::half_from(x * y + z); };
  return one(unpack_first<Half>(a), unpack_first<Half>(b), unpack_first<Half>(c)) |
         one(unpack_second<Half>(a), unpack_second<Half>(b), unpack_second<Half>(c)) << 16;
}
inline uint32_t fma_relu_half2(uint32_t a, uint32_t b, uint32_t c) {
  const uint32_t sum = fma_half2(a, b, c);
  return pack_relu<Half>(unpack_first<Half>(sum), unpack_second<Half>(sum));
}
template <class T>
inline uint32_t max_pair(uint32_t a, uint32_t b) {
  return pack<T>(max_or_nan(unpack_first<T>(a), unpack_first<T>(b)),
                 max_or_nan(unpack_second<T>(a), unpack_second<T>(b)));
}
template <class T>
inline uint32_t min_pair(uint32_t a, uint32_t b) {
  return pack<T>(min_or_nan(unpack_first<T>(a), unpack_first<T>(b)),
                 min_or_nan(unpack_second<T>(a), unpack_second<T>(b)));
}

template <class T>
inline void mma16(float (&d)[4], const float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                  const emulator::Place& place = emulator::Place::current()) {
  constexpr bool kHalf = std::is_same_v<T, Half>;
  static_assert(kHalf || std::is_same_v<T, BFloat16>);
  for (int i = 0; i < 4; ++i) d[i] = c[i];
  emulator::MmaOperands operands{d, a, b};
  emulator::meet(kHalf ? emulator::Collective::kMmaHalf : emulator::Collective::kMmaBFloat16, &operands, place);
}
inline void mma8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                      const emulator::Place& place = emulator::Place::current()) {
  emulator::MmaOperands operands{d, a, b};
  emulator::meet(emulator::Collective::kMmaTf32, &operands, place);
}

}  // namespace device
}  // namespace mnv2
