// A call in windows that follow each other through the same slots, without a kernel's end between them. Why that is
// safe, and what the numbers must be: csrc/README.md, "Windows".
#pragma once

#include "kernels/device/lamport.cuh"

namespace mnnvl::kernels {

// Which windows a block has finished; in its shared memory.
class WindowGate {
 public:
  // By one thread, before a barrier of the block.
  __device__ __forceinline__ void open() {
    const uint32_t warps = blockDim.x / kWarp;
#pragma unroll
    for (int i = 0; i < kCounters; ++i) {
      mbarrier_init(&finished_[i], warps);
      mbarrier_init(&ordered_[i], 1);
      warps_[i] = 0;
    }
    left_ = 0;
  }

  // Before a thread stores anything of `window`: until its block has finished window - kWindowLag. False if a thread of
  // the block has given up. What it waits for are waits of its own block, which end by their deadlines.
  __device__ __forceinline__ bool pass(int window) {
    const int before = window - kWindowLag;
    if (before < 0) return true;
    while (!mbarrier_is_over(&ordered_[before % kCounters], before / kCounters)) {
      if (ld_acquire_cta_u32(&left_) != 0) return false;
    }
    return true;
  }

  // By every thread, when it has taken and cleared all its packs of `window` (of so many). The last warp orders what
  // all have taken and cleared before whatever the block stores behind pass().
  __device__ __forceinline__ void finish(int window, int windows, bool multicast) {
    if (window + kWindowLag >= windows) return;  // nobody waits for it
    __syncwarp();
    if (threadIdx.x % kWarp != 0) return;
    const int i = window % kCounters;
    mbarrier_arrive(&finished_[i]);
    const uint32_t last = blockDim.x / kWarp - 1;
    if (atom_inc_relaxed_cta_u32(&warps_[i], last) != last) return;
    mbarrier_wait(&finished_[i], window / kCounters);  // is over
    fence_acq_rel_sys();
    if (multicast) fence_proxy_alias();
    mbarrier_arrive(&ordered_[i]);
  }
  __device__ __forceinline__ void give_up() { st_release_cta_u32(&left_, 1); }

 private:
  static constexpr int kWarp = 32;
  static constexpr int kCounters = 4;
  static_assert(kCounters >= kWindowLag, "a thread is so many windows ahead of another of its block at most");

  uint64_t finished_[kCounters];  // mbarriers: all warps have finished a window
  uint64_t ordered_[kCounters];   // mbarriers: and what they did is ordered before what comes behind this
  uint32_t warps_[kCounters];     // that have finished it: finds the last one
  uint32_t left_;                 // 1: a thread has given up
};

// The same value, of which the compiler doesn't know it: what follows from it isn't kept in registers meanwhile.
template <typename V>
__device__ __forceinline__ V found_anew(V v) {
  static_assert(sizeof(V) == 4, "one register");
  asm volatile("" : "+r"(v));
  return v;
}

// `Part(p, call, w)` is a thread's part in window w: scatter() stores what peers reduce, reduce() takes what they have
// scattered, collect() what they have reduced. The next window is scattered before one is reduced. reduce() and
// collect() are false if a wait gave up. What a part keeps between them (`kKept`) costs registers; else it begins anew
// for each.
template <typename Part, typename Params>
__device__ __forceinline__ void run_windows(const Params& p, LamportCall& call) {
  __shared__ WindowGate gate;
  const int windows = p.windows.count;
  bool aborted = call.aborted();
  if (windows > kWindowLag) {
    if (threadIdx.x == 0) gate.open();
    // An abort word may have come between the looks of two threads, and those at the gate wait for all of the block.
    aborted = __syncthreads_or(aborted);
  }
  if (aborted) return;
  Part part(p, call, 0);
  part.scatter();
  call.advance(int(ceil_div(windows, kGenerationWindows)));
  for (int w = 0; w < windows; ++w) {
    // Out of the way of calls of one window, whose instructions come from memory for the first time: a jump costs them
    // more than anything here costs the others.
    if (__builtin_expect(w + 1 < windows, false)) {
      if (!gate.pass(w + 1)) return;
      Part(p, call, w + 1).scatter();
    }
    if (w > 0 || !Part::kKept) part.begin(w);
    if (!part.reduce()) return gate.give_up();
    if (!Part::kKept) part.begin(w);
    if (!part.collect()) return gate.give_up();
    gate.finish(w, windows, p.group.multicast != nullptr);
  }
}

}  // namespace mnnvl::kernels
