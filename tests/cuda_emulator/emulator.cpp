#include "emulator.h"

#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <exception>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#else
#define __asan_poison_memory_region(address, size)
#define __asan_unpoison_memory_region(address, size)
#define __sanitizer_start_switch_fiber(fake_stack, bottom, size)
#define __sanitizer_finish_switch_fiber(fake_stack, bottom, size)
#endif

#ifndef __x86_64__
#error "switch_stacks is written for x86-64 only"
#endif
// Saves the registers that a call preserves on this stack and its top in *from, then continues from the saved `to`.
extern "C" void mnv2_switch_stacks(void** from, void* to);
asm(R"(
.text
.type mnv2_switch_stacks, @function
mnv2_switch_stacks:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size mnv2_switch_stacks, . - mnv2_switch_stacks
)");

namespace mnv2 {
namespace emulator {
namespace {

constexpr int kWarp = 32;
constexpr size_t kStackBytes = 256 << 10;
constexpr size_t kMostSharedBytes = 227 << 10;
constexpr int kMostCluster = 8;

struct PendingCopy {
  void* to;
  const void* from;
  bool valid;
  int group;
  size_t bytes = 16;

  void carry_out() const {
    if (valid) {
      std::memcpy(to, from, bytes);
    } else {
      std::memset(to, 0, bytes);
    }
  }
};

// What an Arrival counts.
struct Phases {
  int complete = 0;
  bool expected = false;
  int64_t bytes = 0;  // that are still to come, or negative: too many
  std::vector<PendingCopy> copies;

  // As soon as its copies are all on their way: the hardware may complete it then.
  void complete_if_possible() {
    if (!expected || bytes != 0) return;
    for (const PendingCopy& copy : copies) copy.carry_out();
    copies.clear();
    expected = false;
    ++complete;
  }
};

struct Cta {
  int x, y, z;
  std::unique_ptr<GuardedMemory> shared;
  bool waited;  // for the kernels before
};

struct Thread {
  enum class State { kReady, kWaiting, kReturned };
  GuardedMemory stack{kStackBytes};
  void* stack_top;
  void* fake_stack;  // belongs to AddressSanitizer
  State state;
  Cta* cta;
  int index;  // in it
  // the place where it waits
  Collective collective;
  void* operands;
  Place place;
  // copy_async
  std::vector<PendingCopy> copies;
  int groups;

  bool waits_with(const Thread& other) const {
    return state == State::kWaiting && other.state == State::kWaiting && collective == other.collective &&
           place.line() == other.place.line() && place.column() == other.place.column() &&
           std::strcmp(place.file_name(), other.place.file_name()) == 0;
  }
};

struct Launch {
  Schedule schedule;
  const std::function<void()>* body;
  std::vector<Cta> ctas;                             // of the cluster
  std::span<const std::unique_ptr<Thread>> threads;  // of all of them, one after the other
  std::span<const GuardedMemory* const> in_flight;
  bool in_flight_allowed = true;
  std::map<const void*, Phases> arrivals;  // of all of them
  int spins = 0;                           // of threads that wait for an arrival, since a copy was begun
  Thread* running = nullptr;
  std::exception_ptr error;
  // state of the thread that launched
  void* stack_top;
  void* fake_stack;
  const void* stack_bottom;
  size_t stack_bytes;
  std::mt19937 generator;
};
Launch* launched = nullptr;

const GuardedMemory& shared_of_running() { return *launched->running->cta->shared; }

std::string who() {
  const auto number = [](int i) { return std::to_string(i); };
  return "CTA (" + number(current.block_x) + ", " + number(current.block_y) + ", " + number(current.block_z) + ")";
}

std::string where(const Place& place) {
  const std::string file = place.file_name();
  return " (" + file.substr(file.rfind('/') + 1) + ":" + std::to_string(place.line()) + ")";
}

// ------------------------------------------------------------------------------------------------- between threads

void leave(Thread& thread) {
  Launch& l = *launched;
  __sanitizer_start_switch_fiber(thread.state == Thread::State::kReturned ? nullptr : &thread.fake_stack,
                                 l.stack_bottom, l.stack_bytes);
  mnv2_switch_stacks(&thread.stack_top, l.stack_top);
  __sanitizer_finish_switch_fiber(thread.fake_stack, &l.stack_bottom, &l.stack_bytes);
}

void allow_in_flight(bool allowed) {
  Launch& l = *launched;
  if (l.in_flight_allowed == allowed) return;
  l.in_flight_allowed = allowed;
  for (const GuardedMemory* memory : l.in_flight) memory->allow(allowed);
}

void enter(Thread& thread) {
  Launch& l = *launched;
  l.running = &thread;
  const Cta& cta = *thread.cta;
  current = {
      .thread = thread.index, .block_x = cta.x, .block_y = cta.y, .block_z = cta.z, .shared = cta.shared->data()};
  allow_in_flight(cta.waited || l.in_flight.empty());
  __sanitizer_start_switch_fiber(&l.fake_stack, thread.stack.data(), thread.stack.size());
  mnv2_switch_stacks(&l.stack_top, thread.stack_top);
  __sanitizer_finish_switch_fiber(l.fake_stack, nullptr, nullptr);
  l.running = nullptr;
  if (l.error) std::rethrow_exception(l.error);
}

void first_entry() {
  Launch& l = *launched;
  __sanitizer_finish_switch_fiber(nullptr, &l.stack_bottom, &l.stack_bytes);
  Thread& thread = *l.running;
  try {
    (*l.body)();
  } catch (...) {
    l.error = std::current_exception();
  }
  thread.state = Thread::State::kReturned;
  leave(thread);
}

void prepare(Thread& thread) {
  __asan_unpoison_memory_region(thread.stack.data(), thread.stack.size());
  // The first switch pops six registers and the return address; above them is the return address of a caller.
  void** top = reinterpret_cast<void**>(thread.stack.data() + thread.stack.size()) - 8;
  std::fill_n(top, 8, nullptr);
  top[6] = reinterpret_cast<void*>(&first_entry);
  thread.stack_top = top;
  thread.fake_stack = nullptr;
  thread.state = Thread::State::kReady;
  thread.place = Place();
  thread.copies.clear();
  thread.groups = 0;
}

// A thread that touches forbidden memory is given up on the spot: the handler does not return.
void on_fault(int signal, siginfo_t* information, void*) {
  Launch* const l = launched;
  if (!l || !l->running) {
    ::signal(signal, SIG_DFL);
    return;
  }
  const unsigned char* const address = static_cast<unsigned char*>(information->si_addr);
  const auto within = [&](const GuardedMemory& memory, size_t before, size_t behind) {
    return address >= memory.data() - before && address < memory.data() + memory.size() + behind;
  };
  std::string what = "touched memory that is not its own";
  const GuardedMemory& shared = shared_of_running();
  if (within(shared, 4096, 4096)) {
    what = "touched byte " + std::to_string(address - shared.data()) + " of " + std::to_string(shared.size()) +
           " bytes of shared memory";
  } else if (within(l->running->stack, 4096, 0)) {
    what = "overran its stack";
  } else if (!l->in_flight_allowed && std::any_of(l->in_flight.begin(), l->in_flight.end(),
                                                  [&](auto* memory) { return within(*memory, 0, 0); })) {
    what = "has not waited for the kernel before, and touched what that one may still use";
  }
  if (l->running->place.line() != 0) what += ", after it was last" + where(l->running->place);
  const std::string thread = ", thread " + std::to_string(current.thread) + ": ";
  l->error = std::make_exception_ptr(std::runtime_error(who() + thread + what));
  l->running->state = Thread::State::kReturned;
  leave(*l->running);
}

class FaultHandler {
 public:
  FaultHandler() {
#ifndef __SANITIZE_ADDRESS__
    stack_t stack{};
    stack.ss_sp = memory_.data();
    stack.ss_size = memory_.size();
    sigaltstack(&stack, &former_stack_);
    struct sigaction action{};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    sigaction(SIGSEGV, &action, &former_[0]);
    sigaction(SIGBUS, &action, &former_[1]);
#endif
  }
  ~FaultHandler() {
#ifndef __SANITIZE_ADDRESS__
    sigaction(SIGSEGV, &former_[0], nullptr);
    sigaction(SIGBUS, &former_[1], nullptr);
    sigaltstack(&former_stack_, nullptr);
#endif
  }

 private:
  GuardedMemory memory_{64 << 10};
  stack_t former_stack_{};
  struct sigaction former_[2]{};
};

// ------------------------------------------------------------------------------------------------- warp collectives

void shuffle(const std::unique_ptr<Thread>* warp) {
  const auto operands = [&](int lane) { return static_cast<ShuffleOperands*>(warp[lane]->operands); };
  for (int lane = 0; lane < kWarp; ++lane) operands(lane)->result = operands(lane ^ operands(lane)->mask)->value;
}

void load_matrices(const std::unique_ptr<Thread>* warp) {
  const auto operands = [&](int lane) { return static_cast<MatricesOperands*>(warp[lane]->operands); };
  for (int lane = 0; lane < kWarp; ++lane) {
    for (int i = 0; i < 4; ++i) operands(lane)->to[i] = operands(8 * i + lane / 4)->row[lane % 4];
  }
}

// A sum and kAtOnce products on tensor cores of compute capability 8, column by column, by published measurements (Fasi
// et al. 2021, "Numerical behavior of NVIDIA tensor cores"; Khattak and Mikaitis 2025, "Accurate models of NVIDIA
// tensor cores"). The products are exact. All addends are aligned to the largest and keep one bit more than fp32 has.
// The total is cut to fp32; nothing is rounded to nearest. Later tensor cores keep more bits and add more products at
// once.
template <int kAtOnce>
void add_products(double (&sums)[8], const double* a, const double (*b)[8]) {
  constexpr int kBits = 24;  // bits behind the point of the largest addend
  constexpr uint64_t kExponent = uint64_t{0x7ff} << 52;
  for (int column = 0; column < 8; ++column) {
    double addends[kAtOnce + 1];
    for (int k = 0; k < kAtOnce; ++k) addends[k] = a[k] * b[k][column];
    addends[kAtOnce] = sums[column];
    uint64_t largest = 0;
    for (const double addend : addends) largest = std::max(largest, std::bit_cast<uint64_t>(addend) & kExponent);
    if (largest == 0 || largest == kExponent) {  // only zeros, or NaN or infinity
      for (int k = 0; k < kAtOnce; ++k) sums[column] += addends[k];
      continue;
    }
    const double unit = std::bit_cast<double>(largest) / (1 << kBits);
    const double units = std::bit_cast<double>((uint64_t{2 * 1023 + kBits} << 52) - largest);  // 1 / unit
    int32_t total = 0;
    for (const double addend : addends) total += static_cast<int32_t>(addend * units);
    const double sum = total * unit;
    if (std::fabs(sum) < 0x1p-126) {
      sums[column] = std::trunc(sum * 0x1p149) * 0x1p-149;
    } else {
      sums[column] = std::bit_cast<double>(std::bit_cast<uint64_t>(sum) >> 29 << 29);
    }
  }
}

// Fragments as device.cuh describes them; `near` and `far` are columns of `a` and rows of `b`.
template <int kDepth, class Unpack>
void multiply(const std::unique_ptr<Thread>* warp, const Unpack& unpack) {
  constexpr int kEach = kDepth / 8;  // elements of a register
  double a[16][kDepth], b[kDepth][8], d[16][8];
  for (int lane = 0; lane < kWarp; ++lane) {
    const auto& operands = *static_cast<const MmaOperands*>(warp[lane]->operands);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < kEach; ++i) {
      const int near = kEach * t + i, far = near + 4 * kEach;
      a[g][near] = unpack(operands.a[0], i);
      a[g + 8][near] = unpack(operands.a[1], i);
      a[g][far] = unpack(operands.a[2], i);
      a[g + 8][far] = unpack(operands.a[3], i);
      b[near][g] = unpack(operands.b[0], i);
      b[far][g] = unpack(operands.b[1], i);
    }
    for (int i = 0; i < 4; ++i) d[g + i / 2 * 8][2 * t + i % 2] = operands.d[i];
  }
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < kDepth; k += kDepth / 2) add_products<kDepth / 2>(d[row], &a[row][k], &b[k]);
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    const auto& operands = *static_cast<const MmaOperands*>(warp[lane]->operands);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) operands.d[i] = static_cast<float>(d[g + i / 2 * 8][2 * t + i % 2]);
  }
}

// False if the warp's threads do not all wait for the same one.
bool carry_out_collective(const std::unique_ptr<Thread>* warp) {
  if (warp[0]->collective <= Collective::kClusterBarrier) return false;
  for (int lane = 0; lane < kWarp; ++lane) {
    if (!warp[lane]->waits_with(*warp[0])) return false;
  }
  switch (warp[0]->collective) {
    case Collective::kWarpBarrier: break;
    case Collective::kShuffle: shuffle(warp); break;
    case Collective::kMatrices: load_matrices(warp); break;
    case Collective::kMmaHalf:
      multiply<16>(warp, [](uint32_t v, int i) { return half_to_float(i ? v >> 16 : v & 0xffff); });
      break;
    case Collective::kMmaBFloat16:
      multiply<16>(warp, [](uint32_t v, int i) { return std::bit_cast<float>(i ? v & 0xffff0000 : v << 16); });
      break;
    default: multiply<8>(warp, [](uint32_t v, int) { return std::bit_cast<float>(v & 0xffffe000); });
  }
  for (int lane = 0; lane < kWarp; ++lane) warp[lane]->state = Thread::State::kReady;
  return true;
}

// ------------------------------------------------------------------------------------------------------- schedules

void put_in_order(std::vector<int>& numbers) {
  Launch& l = *launched;
  std::iota(numbers.begin(), numbers.end(), 0);
  if (l.schedule.order == Schedule::Order::kDescending) std::reverse(numbers.begin(), numbers.end());
  if (l.schedule.order == Schedule::Order::kShuffled) std::shuffle(numbers.begin(), numbers.end(), l.generator);
}

std::string doing(size_t index) {
  static constexpr const char* kNames[] = {"barrier",       "cluster_barrier", "warp_barrier",    "shuffle_xor",
                                           "load_matrices", "mma16<Half>",     "mma16<BFloat16>", "mma8_tf32"};
  const Thread& thread = *launched->threads[index];
  const std::string cta = launched->ctas.size() > 1 ? " of CTA z " + std::to_string(thread.cta->z) : "";
  const std::string name = "thread " + std::to_string(thread.index) + cta;
  if (thread.state == Thread::State::kReturned) return name + " has returned";
  return name + " waits at " + kNames[static_cast<int>(thread.collective)] + where(thread.place);
}

bool waits_at(const Thread& thread, Collective collective) {
  return thread.state == Thread::State::kWaiting && thread.collective == collective;
}

// Nobody can run: names two threads that should have met. Warps come first, because a barrier waits for them too.
[[noreturn]] void fail_to_meet() {
  const auto threads = launched->threads;
  const size_t of_cta = threads.size() / launched->ctas.size();
  for (const bool in_warp : {true, false}) {
    for (size_t i = 0; i < threads.size(); ++i) {
      const Thread& thread = *threads[i];
      if (thread.state == Thread::State::kReturned) continue;
      if (in_warp == (thread.collective <= Collective::kClusterBarrier)) continue;
      const size_t group = in_warp ? kWarp : waits_at(thread, Collective::kBarrier) ? of_cta : threads.size();
      for (size_t j = i / group * group; j < i / group * group + group; ++j) {
        if (!threads[j]->waits_with(thread)) {
          current.block_z = thread.cta->z;
          throw std::runtime_error(who() + ": " + doing(i) + " while " + doing(j));
        }
      }
    }
  }
  std::terminate();
}

// Lets threads go on that have all come to the same barrier. false: they have not.
bool pass_barrier(std::span<const std::unique_ptr<Thread>> threads, Collective barrier) {
  const auto here = [&](const auto& thread) { return waits_at(*thread, barrier) && thread->waits_with(*threads[0]); };
  if (!std::all_of(threads.begin(), threads.end(), here)) return false;
  for (const auto& thread : threads) thread->state = Thread::State::kReady;
  return true;
}

void run_cluster() {
  Launch& l = *launched;
  const auto threads = l.threads;
  const size_t of_cta = threads.size() / l.ctas.size();
  for (size_t i = 0; i < threads.size(); ++i) {
    prepare(*threads[i]);
    threads[i]->cta = &l.ctas[i / of_cta], threads[i]->index = static_cast<int>(i % of_cta);
  }
  for (Cta& cta : l.ctas) cta.shared->fill_with_nan(), cta.waited = false;
  l.arrivals.clear();
  std::vector<int> warps(threads.size() / kWarp), lanes(kWarp);
  for (;;) {
    put_in_order(warps);
    bool ran = false;
    for (const int warp : warps) {
      const auto* const first = &threads[static_cast<size_t>(warp * kWarp)];
      bool met;
      do {
        put_in_order(lanes);
        for (const int lane : lanes) {
          if (first[lane]->state != Thread::State::kReady) continue;
          enter(*first[lane]);
          ran = true;
        }
        met = carry_out_collective(first);
      } while (met && l.schedule.warp_at_a_time);
      ran |= met;
    }
    if (ran) continue;
    const auto returned = [](const auto& thread) { return thread->state == Thread::State::kReturned; };
    if (std::all_of(threads.begin(), threads.end(), returned)) {
      // The kernel after the next depends on this wait: it may begin once all thread blocks of the next have waited.
      for (const Cta& cta : l.ctas) {
        if (l.in_flight.empty() || cta.waited) continue;
        current.block_z = cta.z;
        throw std::runtime_error(who() + ": has ended without waiting for the kernel before");
      }
      return;
    }
    for (size_t i = 0; i < threads.size(); i += of_cta)
      ran |= pass_barrier(threads.subspan(i, of_cta), Collective::kBarrier);
    if (!ran && !pass_barrier(threads, Collective::kClusterBarrier)) fail_to_meet();
  }
}

}  // namespace

GuardedMemory::GuardedMemory(size_t bytes, bool at_start) : size_(bytes) {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE)), used = (bytes + page - 1) / page * page;
  page_bytes_ = used + 2 * page;
  void* const pages = mmap(nullptr, page_bytes_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (pages == MAP_FAILED) throw std::bad_alloc();
  pages_ = static_cast<unsigned char*>(pages);
  if (used && mprotect(pages_ + page, used, PROT_READ | PROT_WRITE) != 0) throw std::bad_alloc();
  data_ = pages_ + page + (at_start ? 0 : used - (bytes + 15) / 16 * 16);
  __asan_poison_memory_region(pages_, page_bytes_);
  __asan_unpoison_memory_region(data_, size_);
}

GuardedMemory::~GuardedMemory() {
  __asan_unpoison_memory_region(pages_, page_bytes_);
  munmap(pages_, page_bytes_);
}

void GuardedMemory::fill_with_nan(size_t from) const { std::memset(data_ + from, 0xff, size_ - from); }

void GuardedMemory::allow(bool allowed) const {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  const int access = allowed ? PROT_READ | PROT_WRITE : PROT_NONE;
  if (page_bytes_ > 2 * page && mprotect(pages_ + page, page_bytes_ - 2 * page, access) != 0) throw std::bad_alloc();
}

void launch(Grid grid, int threads, size_t shared_bytes, Schedule schedule, const std::function<void()>& body,
            std::span<const GuardedMemory* const> in_flight) {
  if (launched) throw std::runtime_error("launch: one at a time");
  if (grid.x < 1 || grid.y < 1 || grid.z < 1 || grid.y > 65535 || grid.z > 65535 || threads < kWarp || threads > 1024 ||
      threads % kWarp != 0 || shared_bytes > kMostSharedBytes || grid.cluster < 1 || grid.cluster > kMostCluster ||
      grid.z % grid.cluster != 0) {
    throw std::runtime_error("launch: no GPU takes a grid of " + std::to_string(grid.x) + " x " +
                             std::to_string(grid.y) + " x " + std::to_string(grid.z) + ", " + std::to_string(threads) +
                             " threads, " + std::to_string(shared_bytes) +
                             " bytes of shared memory (here: full warps), clusters of " + std::to_string(grid.cluster));
  }
  const FaultHandler handler;
  Launch l{};
  l.schedule = schedule;
  l.body = &body;
  const auto cluster = static_cast<size_t>(grid.cluster);
  for (size_t i = 0; i < cluster; ++i)
    l.ctas.push_back({.x = 0,
                      .y = 0,
                      .z = 0,
                      .shared = std::make_unique<GuardedMemory>(shared_bytes, schedule.seed % 2 == 1),
                      .waited = false});
  l.in_flight = in_flight;
  l.generator.seed(schedule.seed);
  static std::vector<std::unique_ptr<Thread>> pool;  // their stacks take time to make
  const size_t count = static_cast<size_t>(threads) * cluster;
  while (pool.size() < count) pool.push_back(std::make_unique<Thread>());
  l.threads = std::span(pool).first(count);
  struct Scope {
    explicit Scope(Launch* l) { launched = l; }
    ~Scope() {
      allow_in_flight(true);
      launched = nullptr;
    }
  } const scope(&l);

  const int width = grid.x - grid.first_x;
  std::vector<int> clusters(static_cast<size_t>(width) * static_cast<size_t>(grid.y) * static_cast<size_t>(grid.z) /
                            cluster);
  put_in_order(clusters);
  for (const int number : clusters) {
    for (int i = 0; i < grid.cluster; ++i) {
      Cta& cta = l.ctas[static_cast<size_t>(i)];
      cta.x = grid.first_x + number % width;
      cta.y = number / width % grid.y;
      cta.z = number / width / grid.y * grid.cluster + i;
    }
    run_cluster();
  }
}

const char* report(const std::function<void()>& f) {
  static std::string message;
  try {
    f();
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}

void meet(Collective collective, void* operands, const Place& place) {
  Thread& thread = *launched->running;
  thread.state = Thread::State::kWaiting;
  thread.collective = collective;
  thread.operands = operands;
  thread.place = place;
  leave(thread);
}

void fail(const std::string& what, const Place& place) {
  throw std::runtime_error(who() + ", thread " + std::to_string(current.thread) + ": " + what + where(place));
}

void wait_for_previous() {
  launched->running->cta->waited = true;
  allow_in_flight(true);
}

const void* in_cta(const void* own, size_t bytes, int z, const Place& place) {
  const Launch& l = *launched;
  const GuardedMemory& shared = shared_of_running();
  const ptrdiff_t offset = static_cast<const unsigned char*>(own) - shared.data();
  if (offset < 0 || offset + bytes > shared.size())
    fail("byte " + std::to_string(offset) + " of another CTA's " + std::to_string(shared.size()) +
             " bytes of shared memory",
         place);
  const size_t cta = static_cast<size_t>(z) % l.ctas.size();
  if (l.ctas[cta].z != z) fail("CTA z " + std::to_string(z) + " is in another cluster", place);
  const auto threads = l.threads.subspan(cta * (l.threads.size() / l.ctas.size()), l.threads.size() / l.ctas.size());
  const auto returned = [](const auto& thread) { return thread->state == Thread::State::kReturned; };
  if (std::all_of(threads.begin(), threads.end(), returned))
    fail("shared memory of CTA z " + std::to_string(z) + ", which has ended", place);
  return l.ctas[cta].shared->data() + offset;
}

void copy(void* to, const void* from, bool valid, const Place& place) {
  const Launch& l = *launched;
  const GuardedMemory& shared = shared_of_running();
  const ptrdiff_t offset = static_cast<unsigned char*>(to) - shared.data();
  if (offset < 0 || offset + 16 > static_cast<ptrdiff_t>(shared.size())) {
    fail("copy_async to byte " + std::to_string(offset) + " of " + std::to_string(shared.size()) +
             " bytes of shared memory",
         place);
  }
  if (offset % 16 != 0) fail("copy_async to byte " + std::to_string(offset) + ", unaligned", place);
  if (reinterpret_cast<uintptr_t>(from) % 16 != 0) fail("copy_async from an unaligned address", place);
  if (valid) (void)*static_cast<const volatile unsigned char*>(from);  // must be readable now, not only at the copy
  const PendingCopy copy{to, from, valid, l.running->groups};
  if (!l.schedule.late_copies) return copy.carry_out();
  std::memset(to, 0xff, 16);
  l.running->copies.push_back(copy);
}

bool copies_in_bulk() { return launched->schedule.bulk_copies; }

void start_arrival(const void* arrival, const Place& place) {
  const GuardedMemory& shared = shared_of_running();
  const ptrdiff_t offset = static_cast<const unsigned char*>(arrival) - shared.data();
  if (offset < 0 || offset + 8 > static_cast<ptrdiff_t>(shared.size()) || offset % 8 != 0)
    fail("arrival at byte " + std::to_string(offset) + " of shared memory", place);
  launched->arrivals[arrival] = {};
}

static Phases& phases_of(const void* arrival, const Place& place) {
  const auto found = launched->arrivals.find(arrival);
  if (found == launched->arrivals.end()) fail("an arrival that was not started", place);
  return found->second;
}

void expect(const void* arrival, int bytes, const Place& place) {
  Phases& phases = phases_of(arrival, place);
  if (phases.expected) fail("expects bytes of a phase twice", place);
  phases.expected = true;
  phases.bytes += bytes;
}

void copy_in_bulk(void* to, const void* from, int bytes, const void* arrival, const Place& place) {
  Launch& l = *launched;
  Phases& phases = phases_of(arrival, place);
  const GuardedMemory& shared = shared_of_running();
  const ptrdiff_t offset = static_cast<unsigned char*>(to) - shared.data();
  if (offset < 0 || offset + bytes > static_cast<ptrdiff_t>(shared.size())) {
    fail("copy_bulk to bytes " + std::to_string(offset) + " to " + std::to_string(offset + bytes) + " of " +
             std::to_string(shared.size()) + " bytes of shared memory",
         place);
  }
  if (bytes <= 0 || bytes % 16 != 0) fail("copy_bulk of " + std::to_string(bytes) + " bytes", place);
  if (offset % 16 != 0 || reinterpret_cast<uintptr_t>(from) % 16 != 0) fail("copy_bulk, unaligned", place);
  const auto* const source = static_cast<const volatile unsigned char*>(from);
  (void)source[0], (void)source[bytes - 1];  // must be readable now, not only at the copy
  const PendingCopy copy{to, from, true, 0, static_cast<size_t>(bytes)};
  if (l.schedule.late_copies) {
    std::memset(to, 0xff, copy.bytes);
    phases.copies.push_back(copy);
  } else {
    copy.carry_out();
  }
  phases.bytes -= bytes;
  l.spins = 0;
}

void wait_for_arrival(const void* arrival, bool odd, const Place& place) {
  Launch& l = *launched;
  Thread& thread = *l.running;
  for (;;) {
    Phases& phases = phases_of(arrival, place);
    const auto over = [&] { return phases.complete % 2 != static_cast<int>(odd); };
    if (over()) return;
    phases.complete_if_possible();
    if (over()) return;
    if (++l.spins > 1 << 16) fail("waits for copies that nobody makes", place);
    leave(thread);  // it stays ready
  }
}

void commit_copies() { ++launched->running->groups; }

void wait_for_copies(int pending) {
  Thread& thread = *launched->running;
  const auto first_pending = std::find_if(thread.copies.begin(), thread.copies.end(), [&](const PendingCopy& copy) {
    return copy.group >= thread.groups - pending;
  });
  std::for_each(thread.copies.begin(), first_pending, [](const PendingCopy& copy) { copy.carry_out(); });
  thread.copies.erase(thread.copies.begin(), first_pending);
}

}  // namespace emulator
}  // namespace mnv2
