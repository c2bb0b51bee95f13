// Enough of CUDA's device side to run a kernel's source on a CPU: each block is a thread of the system, its threads are
// fibers that take turns, changing over wherever they touch shared memory of any kind. For the protocols of kernels,
// not for their speed or their order of memory accesses, which is that of this CPU.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <array>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static thread_local  // one for each block

namespace mnnvl::emulation {

struct Index {
  unsigned x = 0;
};
struct alignas(16) Pack {
  uint32_t x, y, z, w;
};

constexpr int kWarpSize = 32;

// What the blocks of a cluster share.
struct Cluster {
  explicit Cluster(int blocks) : size(blocks), placed(size_t(blocks)) {}
  const int size;
  std::atomic<uint64_t> arrived{0};
  std::vector<std::vector<void*>> placed;  // of each block: objects in its shared memory, in one order
};

// The fibers of one block, run by the thread that calls run().
class Block {
 public:
  Block(unsigned index, unsigned blocks, unsigned threads, Cluster& cluster)
      : index_(index), blocks_(blocks), cluster_(cluster), warps_(threads / kWarpSize) {
    for (unsigned i = 0; i < threads; ++i) fibers_.push_back(std::make_unique<Fiber>());
  }

  void run(const std::function<void()>& kernel) {
    current() = this;
    kernel_ = &kernel;
    for (auto& fiber : fibers_) {
      getcontext(&fiber->context);
      fiber->context.uc_stack.ss_sp = fiber->stack.get();
      fiber->context.uc_stack.ss_size = kStackBytes;
      makecontext(&fiber->context, reinterpret_cast<void (*)()>(&Block::enter), 0);
    }
    for (bool left = true; left;) {
      left = false;
      for (running_ = 0; running_ < fibers_.size(); ++running_) {
        if (fibers_[running_]->ended) continue;
        left = true;
        resume(*fibers_[running_]);
      }
      std::this_thread::yield();
    }
    current() = nullptr;
  }

  static Block*& current() {
    static thread_local Block* block = nullptr;
    return block;
  }
  // By jumps: swapcontext() asks the system for the signal mask each time.
  __attribute__((noinline)) void yield() {
    if (_setjmp(fibers_[running_]->place) == 0) _longjmp(scheduler_, 1);
  }
  unsigned thread() const { return static_cast<unsigned>(running_); }
  unsigned threads() const { return static_cast<unsigned>(fibers_.size()); }
  unsigned index() const { return index_; }
  unsigned blocks() const { return blocks_; }
  Cluster& cluster() const { return cluster_; }
  int cluster_rank() const { return int(index_) % cluster_.size; }
  uint64_t& barriers_of_thread() { return fibers_[running_]->barriers; }

  // All threads of a warp that haven't ended bring a value, and each goes on with all of them.
  const uint32_t* meet(uint32_t value) {
    Warp& warp = warps_[running_ / kWarpSize];
    const uint64_t round = warp.round;
    warp.values[round % 2][running_ % kWarpSize] = value;
    ++warp.arrived;
    warp.end_round();
    while (warp.round == round) yield();
    return warp.values[round % 2];
  }
  void meet_all() { meet_in(all_, unsigned(fibers_.size())); }
  // Whether any of the block says so.
  bool meet_all_or(bool vote) {
    votes_ = votes_ || vote;
    meet_all();
    const bool any = votes_;
    meet_all();
    votes_ = false;
    return any;
  }
  void meet_team(unsigned team, unsigned threads) { meet_in(teams_.at(team), threads); }

 private:
  static constexpr size_t kStackBytes = 64 << 10;
  struct Fiber {
    ucontext_t context;  // to begin in
    jmp_buf place;
    bool begun = false;
    std::unique_ptr<char[]> stack{new char[kStackBytes]};
    bool ended = false;
    uint64_t barriers = 0;  // of the cluster, so far
  };
  struct Warp {
    uint64_t round = 0;
    int arrived = 0, ended = 0;
    uint32_t values[2][kWarpSize] = {};

    void end_round() {
      if (arrived == 0 || arrived + ended < kWarpSize) return;
      arrived = 0;
      ++round;
    }
  };

  struct Meeting {
    uint64_t round = 0;
    unsigned arrived = 0;
  };

  void meet_in(Meeting& meeting, unsigned threads) {
    const uint64_t round = meeting.round;
    if (++meeting.arrived == threads) {
      meeting.arrived = 0;
      ++meeting.round;
    }
    while (meeting.round == round) yield();
  }
  __attribute__((noinline)) void resume(Fiber& fiber) {
    if (_setjmp(scheduler_) != 0) return;
    if (fiber.begun) _longjmp(fiber.place, 1);
    fiber.begun = true;
    setcontext(&fiber.context);
  }
  static void enter() {
    Block* block = current();
    (*block->kernel_)();
    block->fibers_[block->running_]->ended = true;
    Warp& warp = block->warps_[block->running_ / kWarpSize];
    ++warp.ended;
    warp.end_round();
    _longjmp(block->scheduler_, 1);
  }

  const unsigned index_, blocks_;
  Cluster& cluster_;
  std::vector<Warp> warps_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  size_t running_ = 0;
  Meeting all_;
  bool votes_ = false;
  std::array<Meeting, 16> teams_;
  const std::function<void()>* kernel_ = nullptr;
  jmp_buf scheduler_;
};

// What comes from outside between two threads' looks at one place: `value`, to `word`, behind so many loads of `place`.
struct Interruption {
  std::atomic<const void*> place{nullptr};
  std::atomic<int> loads{0};
  uint32_t* word = nullptr;
  uint32_t value = 0;

  void loaded(const void* address) {
    if (address == place.load() && loads.fetch_sub(1) == 1) __atomic_store_n(word, value, __ATOMIC_RELAXED);
  }
};
inline Interruption interruption;

inline Index thread_index() { return {Block::current()->thread()}; }
inline Index block_index() { return {Block::current()->index()}; }
inline Index block_dim() { return {Block::current()->threads()}; }
inline Index grid_dim() { return {Block::current()->blocks()}; }

}  // namespace mnnvl::emulation

#define threadIdx ::mnnvl::emulation::thread_index()
#define blockIdx ::mnnvl::emulation::block_index()
#define blockDim ::mnnvl::emulation::block_dim()
#define gridDim ::mnnvl::emulation::grid_dim()

using uint4 = mnnvl::emulation::Pack;

inline void __syncthreads() { mnnvl::emulation::Block::current()->meet_all(); }
inline bool __syncthreads_or(bool vote) { return mnnvl::emulation::Block::current()->meet_all_or(vote); }
inline void __syncwarp() { mnnvl::emulation::Block::current()->meet(0); }
inline unsigned __ballot_sync(unsigned, bool vote) {
  const uint32_t* votes = mnnvl::emulation::Block::current()->meet(vote ? 1 : 0);
  unsigned ballot = 0;
  for (int i = 0; i < mnnvl::emulation::kWarpSize; ++i) ballot |= votes[i] << i;
  return ballot;
}
inline bool __any_sync(unsigned mask, bool vote) { return __ballot_sync(mask, vote) != 0; }
inline uint32_t __reduce_max_sync(unsigned, uint32_t value) {
  const uint32_t* values = mnnvl::emulation::Block::current()->meet(value);
  uint32_t most = 0;
  for (int i = 0; i < mnnvl::emulation::kWarpSize; ++i) most = values[i] > most ? values[i] : most;
  return most;
}
template <typename T>
T min(T a, T b) {
  return a < b ? a : b;
}
template <typename T>
T max(T a, T b) {
  return a > b ? a : b;
}
inline int __ffs(unsigned bits) { return __builtin_ffs(static_cast<int>(bits)); }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline void __threadfence_system() { std::atomic_thread_fence(std::memory_order_seq_cst); }
inline uint32_t atomicCAS(uint32_t* address, uint32_t expected, uint32_t desired) {
  __atomic_compare_exchange_n(address, &expected, desired, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
  return expected;
}
inline uint32_t atomicCAS_system(uint32_t* address, uint32_t expected, uint32_t desired) {
  return atomicCAS(address, expected, desired);
}
