// The primitives of csrc/cuda/device.h for tests on a CPU: an emulator in which a block's threads are fibres.
//
// Blocks run one after another; a fibre runs until it waits for a barrier, or for the other lanes of its warp. What a
// GPU may do in any order is done in the order that Emulator::policy says, so that two runs under different policies
// give the same bits only if the kernel synchronises enough:
//   - the order of threads between two barriers: ascending, descending, or shuffled anew each round;
//   - asynchronous copies: at once, or as late as wait_for_copies() allows.
// Shared memory is NaN at the start of each block. A fault is printed and ends the process: lanes of a warp that meet
// in different operations, a barrier that some threads never reach, an address outside shared memory.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <type_traits>
#include <vector>

#include "../cuda/device.h"

namespace moe::cuda {

struct Policy {
  int order = 0;  // 0 ascending, 1 descending, otherwise the seed of a shuffle
  bool late_copies = true;
};

class Emulator {
 public:
  static Emulator& get() {
    static Emulator emulator;
    return emulator;
  }

  Policy policy;
  int threads = 0;  // of a block of the kernel that runs

  void run(Grid grid, int threads, size_t shared_bytes, const std::function<void()>& thread) {
    work_ = &thread;
    grow(threads);
    for (int64_t z = 0; z < grid.z; ++z)
      for (int64_t y = 0; y < grid.y; ++y)
        for (int64_t x = 0; x < grid.x; ++x) {
          block_ = {static_cast<int>(x), static_cast<int>(y), static_cast<int>(z)};
          run_block(threads, shared_bytes);
        }
  }

  // what the primitives are made of

  int thread() const { return current_->index; }
  Index3 block() const { return block_; }
  char* shared() { return shared_.get(); }

  void* shared_at(uint32_t address, size_t bytes) {
    check(address + bytes <= shared_bytes_, "an address outside shared memory");
    return shared_.get() + address;
  }

  void copy(uint32_t to, const void* from, bool real) {
    check(to % 16 == 0 && reinterpret_cast<uintptr_t>(from) % 16 == 0, "an asynchronous copy that is not aligned");
    current_->copies.back().push_back({to, from, real});
    if (!policy.late_copies) perform(current_->copies.back());
  }
  void commit() { current_->copies.emplace_back(); }
  void wait_copies(size_t pending) {
    auto& groups = current_->copies;  // the last one is still open
    while (groups.size() > pending + 1) {
      perform(groups.front());
      groups.erase(groups.begin());
    }
  }

  // Waits until `threads` threads have come to a barrier.
  void meet(int barrier, int threads, bool wait) {
    check(barrier >= 0 && barrier < kBarriers && threads % kWarp == 0, "no such barrier");
    await(barriers_[barrier], threads, wait);
  }

  // What this lane gives to a collective operation of its warp, and after the meeting what every lane gave.
  template <typename T>
  const T* exchange(const char* operation, const T& mine) {
    static_assert(sizeof(T) <= kExchange && std::is_trivially_copyable_v<T>);
    WarpState& warp = warps_[thread() / kWarp];
    Meeting& meeting = warp.meetings[current_->collectives++ % 2];
    if (warp.gathering.arrived == 0) meeting.operation = operation;
    check(meeting.operation == operation, "lanes of a warp in different operations");
    reinterpret_cast<T*>(meeting.values)[thread() % kWarp] = mine;
    await(warp.gathering, kWarp, true);
    return reinterpret_cast<const T*>(meeting.values);
  }

  static void check(bool right, const char* what) {
    if (right) return;
    std::fprintf(stderr, "emulated GPU: %s (thread %d of block %d, %d, %d)\n", what, get().thread(), get().block_.x,
                 get().block_.y, get().block_.z);
    std::abort();
  }

 private:
  static constexpr int kBarriers = 16;
  static constexpr size_t kStack = 128 << 10;
  static constexpr size_t kExchange = 64;

  struct Copy {
    uint32_t to;
    const void* from;
    bool real;
  };
  struct Fibre {
    int index;
    bool finished;
    unsigned collectives;
    std::vector<std::vector<Copy>> copies;  // groups, oldest first
    std::unique_ptr<char[]> stack;
    ucontext_t start;
    jmp_buf here;
    bool started = false;
  };
  struct Barrier {
    int arrived = 0;
    unsigned generation = 0;
  };
  struct Meeting {
    const char* operation;
    alignas(16) char values[kWarp * kExchange];
  };
  struct WarpState {
    Barrier gathering;
    Meeting meetings[2];  // a lane may be one operation ahead of another that still reads
  };

  void grow(int threads) {
    while (static_cast<int>(fibres_.size()) < threads) {
      auto fibre = std::make_unique<Fibre>();
      fibre->index = static_cast<int>(fibres_.size());
      fibre->stack.reset(new char[kStack]);
      fibres_.push_back(std::move(fibre));
    }
    if (warps_.size() < fibres_.size() / kWarp + 1) warps_.resize(fibres_.size() / kWarp + 1);
  }

  void run_block(int threads, size_t shared_bytes) {
    shared_bytes_ = shared_bytes;
    shared_.reset(static_cast<char*>(std::aligned_alloc(128, (shared_bytes + 255) / 128 * 128)));
    std::memset(shared_.get(), 0xff, shared_bytes);  // NaN in every type
    for (Barrier& barrier : barriers_) barrier = {};
    for (WarpState& warp : warps_) warp.gathering = {};
    std::vector<Fibre*> live;
    for (int i = 0; i < threads; ++i) {
      Fibre& fibre = *fibres_[i];
      fibre.finished = false;
      fibre.collectives = 0;
      fibre.copies.assign(1, {});
      live.push_back(&fibre);
    }
    if (policy.order == 1) live = {live.rbegin(), live.rend()};
    while (!live.empty()) {
      if (policy.order > 1) std::shuffle(live.begin(), live.end(), random_);
      progress_ = false;
      for (Fibre* fibre : live) resume(*fibre);
      size_t left = 0;
      for (Fibre* fibre : live)
        if (!fibre->finished) live[left++] = fibre;
      check(progress_ || left < live.size(), "a barrier that some threads never reach");
      live.resize(left);
    }
  }

  void resume(Fibre& fibre) {
    current_ = &fibre;
    if (_setjmp(scheduler_)) return;
    if (fibre.started) _longjmp(fibre.here, 1);
    fibre.started = true;
    getcontext(&fibre.start);
    fibre.start.uc_stack.ss_sp = fibre.stack.get();
    fibre.start.uc_stack.ss_size = kStack;
    fibre.start.uc_link = nullptr;
    makecontext(&fibre.start, &Emulator::body, 0);
    setcontext(&fibre.start);
  }

  // A fibre's life: one thread of one block after another.
  static void body() {
    for (;;) {
      Emulator& emulator = get();
      (*emulator.work_)();
      emulator.wait_copies(0);
      check(emulator.current_->copies.back().empty(), "a copy that was never committed");
      emulator.current_->finished = true;
      emulator.pause();
    }
  }

  void pause() {
    if (_setjmp(current_->here) == 0) _longjmp(scheduler_, 1);
  }

  void await(Barrier& barrier, int threads, bool wait) {
    progress_ = true;
    const unsigned generation = barrier.generation;
    if (++barrier.arrived == threads) {
      barrier.arrived = 0;
      ++barrier.generation;
      return;
    }
    while (wait && barrier.generation == generation) pause();
  }

  void perform(std::vector<Copy>& group) {
    for (const Copy& copy : group) {
      void* to = shared_at(copy.to, 16);
      copy.real ? std::memcpy(to, copy.from, 16) : std::memset(to, 0, 16);
    }
    group.clear();
  }

  struct Free {
    void operator()(char* memory) const { std::free(memory); }
  };
  std::unique_ptr<char, Free> shared_;
  size_t shared_bytes_ = 0;
  std::vector<std::unique_ptr<Fibre>> fibres_;
  std::vector<WarpState> warps_;
  Barrier barriers_[kBarriers];
  Index3 block_ = {};
  Fibre* current_ = nullptr;
  const std::function<void()>* work_ = nullptr;
  jmp_buf scheduler_;
  std::mt19937 random_{1};
  bool progress_ = false;
};

inline Emulator& emulator() { return Emulator::get(); }

inline int thread_index() { return emulator().thread(); }
inline int lane_index() { return emulator().thread() % kWarp; }
inline int warp_index() { return emulator().thread() / kWarp; }
inline Index3 block_index() { return emulator().block(); }

inline char* shared_memory() { return emulator().shared(); }
inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(static_cast<const char*>(pointer) - emulator().shared());
}

inline void copy_async(uint32_t to, const void* from, bool real) { emulator().copy(to, from, real); }
inline void load_shared(float (&v)[4], uint32_t from) { std::memcpy(v, emulator().shared_at(from, 16), 16); }
inline void store_shared(uint32_t to, float first, float second) {
  Emulator::check(to % 8 == 0, "a store to shared memory that is not aligned");
  const float both[2] = {first, second};
  std::memcpy(emulator().shared_at(to, 8), both, 8);
}
inline void commit_copies() { emulator().commit(); }
template <int kPending>
void wait_for_copies() {
  emulator().wait_copies(kPending);
}
inline void sync_warp() { emulator().exchange("sync_warp", 0); }
inline void sync_some(int barrier, int threads) { emulator().meet(barrier, threads, true); }
inline void arrive(int barrier, int threads) { emulator().meet(barrier, threads, false); }

template <typename T>
T shuffle(T value, int lane) {
  return emulator().exchange("shuffle", value)[lane];
}
template <typename T>
T shuffle_xor(T value, int mask) {
  return emulator().exchange("shuffle_xor", value)[lane_index() ^ mask];
}
inline bool any(bool value) {
  const bool* all = emulator().exchange("any", value);
  for (int lane = 0; lane < kWarp; ++lane)
    if (all[lane]) return true;
  return false;
}

inline void load_matrices(uint32_t (&r)[4], uint32_t row) {
  Emulator::check(row % 16 == 0, "a row of a matrix that is not aligned");
  const uint32_t* rows = emulator().exchange("load_matrices", row);
  const int lane = lane_index();
  for (int m = 0; m < 4; ++m)
    std::memcpy(&r[m], emulator().shared_at(rows[8 * m + lane / 4] + 4 * (lane % 4), 4), 4);
}

inline void load_matrices_transposed(uint32_t (&r)[4], uint32_t row) {
  Emulator::check(row % 16 == 0, "a row of a matrix that is not aligned");
  const uint32_t* rows = emulator().exchange("load_matrices_transposed", row);
  const int lane = lane_index();
  for (int m = 0; m < 4; ++m) {
    uint16_t pair[2];
    for (int i = 0; i < 2; ++i)
      std::memcpy(&pair[i], emulator().shared_at(rows[8 * m + 2 * (lane % 4) + i] + 2 * (lane / 4), 2), 2);
    r[m] = static_cast<uint32_t>(pair[0]) | static_cast<uint32_t>(pair[1]) << 16;
  }
}

inline float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline uint32_t as_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline float to_float(Bf16 value) { return as_float(static_cast<uint32_t>(value.bits) << 16); }
inline float to_float(Half value) {
  const uint32_t sign = (value.bits & 0x8000u) << 16, exponent = value.bits >> 10 & 31, mantissa = value.bits & 1023;
  if (exponent == 31) return as_float(sign | 0x7f800000u | mantissa << 13);
  const float magnitude = exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -24)
                                        : std::ldexp(static_cast<float>(mantissa + 1024), static_cast<int>(exponent) - 25);
  return sign ? -magnitude : magnitude;
}

inline Bf16 to_bf16(float value) {
  const uint32_t bits = as_bits(value);
  if (std::isnan(value)) return {static_cast<uint16_t>(bits >> 16 | 64)};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

inline Half to_half(float value) {
  const uint16_t sign = static_cast<uint16_t>(as_bits(value) >> 16 & 0x8000);
  const float magnitude = std::fabs(value);
  if (std::isnan(value)) return {static_cast<uint16_t>(sign | 0x7e00)};
  if (magnitude >= 65520.f) return {static_cast<uint16_t>(sign | 0x7c00)};
  int exponent = -14;
  if (magnitude >= 0x1p-14f) exponent = std::ilogb(magnitude);
  const float quantum = std::ldexp(1.f, exponent - 10);
  const int steps = static_cast<int>(std::nearbyint(magnitude / quantum));  // 1024..2048, or fewer: denormal
  return {static_cast<uint16_t>(sign | (steps + ((exponent + 14) << 10)))};
}

inline float to_tf32(float value) {
  return std::isfinite(value) ? as_float((as_bits(value) + 0x1000) & ~0x1fffu) : value;
}

template <typename Type>
auto rounded(float value) {
  if constexpr (std::is_same_v<Type, Bf16>) return to_bf16(value);
  else if constexpr (std::is_same_v<Type, Half>) return to_half(value);
  else return to_tf32(value);
}

inline int computed_anew(int value) { return value; }
inline float fused(float a, float b, float c) { return std::fma(a, b, c); }

// The two numbers of a register, in the order of k; one for tf32.
inline void unpack(Bf16, uint32_t bits, float* out) {
  out[0] = as_float(bits << 16), out[1] = as_float(bits & 0xffff0000u);
}
inline void unpack(Half, uint32_t bits, float* out) {
  out[0] = to_float(Half{static_cast<uint16_t>(bits)}), out[1] = to_float(Half{static_cast<uint16_t>(bits >> 16)});
}
inline void unpack(Tf32, uint32_t bits, float* out) {
  Emulator::check((bits & 0x1fffu) == 0 || (bits & 0x7f800000u) == 0x7f800000u, "an operand that is no tf32");
  out[0] = as_float(bits);
}

// Products are exact and added up in double: a GPU's order of summation is not documented.
template <typename Type>
void multiply(Type type, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  constexpr int kPair = std::is_same_v<Type, Tf32> ? 1 : 2;
  struct Operands {
    float a[4 * kPair], b[2 * kPair];
  } mine;
  for (int i = 0; i < 4; ++i) unpack(type, a[i], mine.a + kPair * i);
  for (int i = 0; i < 2; ++i) unpack(type, b[i], mine.b + kPair * i);
  const Operands* all = emulator().exchange("multiply", mine);
  const int group = lane_index() / 4, member = lane_index() % 4;
  for (int i = 0; i < 4; ++i) {  // rows group and group + 8, columns 2 member and 2 member + 1
    double sum = d[i];
    for (int half = 0; half < 2; ++half)
      for (int quad = 0; quad < 4; ++quad)
        for (int pair = 0; pair < kPair; ++pair)
          sum += static_cast<double>(all[4 * group + quad].a[kPair * (2 * half + i / 2) + pair]) *
                 all[4 * (2 * member + i % 2) + quad].b[kPair * half + pair];
    d[i] = static_cast<float>(sum);
  }
}

inline Device current_device() { return kLargestDevice; }

template <class Kernel>
Status launch(const typename Kernel::Params& params, Grid grid, size_t shared_bytes, void*) {
  static_assert(Kernel::kThreads % kWarp == 0 && sizeof(params) <= 4096);
  if (shared_bytes > 227 << 10 || grid.y > 65535 || grid.z > 65535) return Status::cuda_error;
  emulator().threads = Kernel::kThreads;
  emulator().run(grid, Kernel::kThreads, shared_bytes, [&params] { Kernel::run(params); });
  return Status::ok;
}

inline void sync_block() { sync_some(0, emulator().threads); }

}  // namespace moe::cuda
