// What the Lamport kernels share: the generation of a call, publishing packs, taking them.
//
// At rest every word of every generation is the sentinel. Who consumes a pack leaves the sentinel in its slot, in the
// same call; nobody else clears. In a call each word of a generation is written by one rank, and then read and cleared
// by one thread of its owner, which has seen all four words of the pack: a 16-byte store need not land as a whole, but
// once each word has, nothing of it is still to come that could undo the clearing.
//
// Safety (the long form: csrc/README.md), of calls of one generation. Rank A clears the slots of call c in call c. A
// peer writes there again in call c + kGenerations, which it enters only after finishing the call before. That one
// needed data which A sent in it, so A had entered it, after its own call c had ended. Kernel boundaries order A's
// clearing before A's sends. Within a call in windows, fences do: windows.cuh.
//
// A wait that gives up leaves its slots dirty. The group is then broken for good: no later call publishes or reads a
// pack.
//
// Progress: a thread waits only for packs that peers publish before they wait, in the order of windows. All blocks of a
// launch find room: one a multiprocessor at most (kernels of several groups must fit beside each other).
#pragma once

#include "kernels/device/memory_order.cuh"
#include "kernels/device/pack.cuh"
#include "kernels/device/wait.cuh"

namespace mnnvl::kernels {

class LamportCall {
 public:
  // Reads this rank's state. Every thread of the grid makes one.
  __device__ __forceinline__ LamportCall(const DeviceGroup& g, Operation operation) : g_(g), operation_(operation) {
    const uint4 head = ld_relaxed_sys_v4(own());
    generation_ = head.x;
    abort_ = head.y;
    calls_ = head.z;
  }

  // True when the group has failed before, which then is recorded here too: this rank may not have waited for anybody.
  __device__ __forceinline__ bool aborted() const {
    if (abort_ == 0) return false;
    give_up(g_, FailureCause::kPeerFailed, abort_rank(abort_), operation_, /*stage=*/0, calls_, 0, 0);
    return true;
  }
  __device__ __forceinline__ uint32_t sequence() const { return calls_; }

  // Offset of a stage of this call's generation in every rank's workspace, or of one so many generations on.
  __device__ __forceinline__ int64_t stage(int s, int ahead = 0) const {
    const uint32_t generation = ahead == 0 ? generation_ : (generation_ + ahead) % kGenerations;
    return generation * g_.layout.generation_bytes + s * (g_.layout.generation_bytes / 2);
  }

  // Block-wide, once: counts this block in, and lets the last one to come write the state of the next call. Every
  // thread's load of the state has returned before its block's barrier (aborted() has looked at it), so no block of
  // this call can see the new state. `generations`: that this call uses.
  __device__ __forceinline__ void advance(int generations = 1) {
    begin_advance();
    end_advance(generations);
  }
  // In two halves, so that the thread that counts need not wait for its atomic: the second is the last thing it does.
  __device__ __forceinline__ void begin_advance() {
    __syncthreads();
    if (threadIdx.x == blockDim.x - 1) before_ = atom_inc_relaxed_gpu_u32(&own()->arrivals, gridDim.x - 1);
  }
  __device__ __forceinline__ void end_advance(int generations = 1) const {
    if (threadIdx.x != blockDim.x - 1 || before_ != gridDim.x - 1) return;
    own()->generation = (generation_ + generations) % kGenerations;
    own()->calls = calls_ + 1;
  }

 private:
  __device__ __forceinline__ DeviceControl* own() const { return control_of(g_, g_.rank); }

  const DeviceGroup& g_;
  const Operation operation_;
  uint32_t generation_, abort_, calls_;
  uint32_t before_ = 0;  // blocks that came before this one, with its last thread
};

// Stores a pack at `offset` of every other rank's workspace: one multicast store, which fills the own workspace too,
// or one store each. Starts with the next rank, so that not all ranks store to the same one first.
template <int kWorld>
__device__ __forceinline__ void publish(const DeviceGroup& g, int64_t offset, uint4 pack) {
  if (g.multicast != nullptr) {
    multimem_st_relaxed_sys_v4(g.multicast + offset, pack);
    return;
  }
  const int world = kWorld ? kWorld : g.world_size;
#pragma unroll
  for (int i = 1; i < world; ++i) {
    const int peer = g.rank + i < world ? g.rank + i : g.rank + i - world;
    st_relaxed_sys_v4(g.peers[peer] + offset, pack);
  }
}

// Leaves the sentinel in a slot of the own workspace whose pack the calling thread has seen complete. Strong like the
// store that filled the slot, so that the two are ordered: the load in between has seen the first.
__device__ __forceinline__ void clear(std::byte* slot) { st_relaxed_sys_v4(slot, sentinel_pack()); }

// Waits for the pack that `source` stores at `slot` of the own workspace, takes it and clears the slot. False if the
// wait gave up.
__device__ __forceinline__ bool take(std::byte* slot, int source, Wait& wait, uint64_t pack_index, uint4& pack) {
  while (has_sentinel(pack = ld_relaxed_sys_v4(slot))) {
    if (!wait.keep_on(source, pack_index, kLamportSentinel)) return false;
  }
  clear(slot);
  return true;
}

// Several packs of one source at once, as below.
template <int kBatch>
__device__ __forceinline__ bool take(std::byte* first, int64_t apart, int count, int source, Wait& wait,
                                     uint64_t pack_index, uint4 (&packs)[kBatch]) {
  bool missing;
  do {
    missing = false;
#pragma unroll
    for (int n = 0; n < kBatch; ++n) {
      if (n == 0 || n < count) packs[n] = ld_relaxed_sys_v4(first + n * apart);
    }
#pragma unroll
    for (int n = 0; n < kBatch; ++n) {
      if ((n == 0 || n < count) && has_sentinel(packs[n])) missing = true;
    }
    if (missing && !wait.keep_on(source, pack_index, kLamportSentinel)) return false;
  } while (missing);
#pragma unroll
  for (int n = 0; n < kBatch; ++n) {
    if (n == 0 || n < count) clear(first + n * apart);
  }
  return true;
}

constexpr int kNoRank = -1;

// Takes the packs of all ranks, the one of rank r from `slot(r)`, and sums them in rank order.
// Only the pack of rank `kept` (or of kNoRank) has been through no slot: it is `own`. False if the wait gave up.
// `kClearFirst`: the slots are cleared before the sum, which costs registers and is faster where more is to be stored
// behind it (docs/notes.md).
template <typename T, int kWorld, bool kClearFirst = false, typename Slot>
__device__ __forceinline__ bool take_and_sum(const DeviceGroup& g, const Slot& slot, int kept, uint4 own, Wait wait,
                                             uint64_t pack_index, Accumulator<T>& acc) {
  if constexpr (kWorld != 0) {
    // All ranks' loads in flight at once, all again while one is missing: so no slot is cleared before all are
    // complete.
    uint4 packs[kWorld];
    uint32_t missing;  // a bit per rank
    do {
      missing = 0;
#pragma unroll
      for (int r = 0; r < kWorld; ++r) packs[r] = r == kept ? own : ld_relaxed_sys_v4(slot(r));
#pragma unroll
      for (int r = 0; r < kWorld; ++r) {
        if (has_sentinel(packs[r])) missing |= 1u << r;
      }
      if (missing != 0 && !wait.keep_on(__ffs(missing) - 1, pack_index, kLamportSentinel, missing)) return false;
    } while (missing != 0);
    const auto clear_all = [&] {
#pragma unroll
      for (int r = 0; r < kWorld; ++r) {
        if (r != kept) clear(slot(r));
      }
    };
    if constexpr (kClearFirst) clear_all();
    acc.begin(packs[0]);
#pragma unroll
    for (int r = 1; r < kWorld; ++r) acc.add(packs[r]);
    if constexpr (!kClearFirst) clear_all();
  } else {
    for (int r = 0; r < g.world_size; ++r) {
      uint4 pack = own;
      if (r != kept && !take(slot(r), r, wait, pack_index, pack)) return false;
      if (r == 0) {
        acc.begin(pack);
      } else {
        acc.add(pack);
      }
    }
  }
  return true;
}

// Several packs at once, number n of rank r from `slot(r, n)`: `count` of them, from 1. A thread has all of their loads
// in flight, and clears none before all are complete. `sums`: divided and rounded.
template <typename T, int kWorld, bool kClearFirst = false, int kBatch, typename Slot>
__device__ __forceinline__ bool take_and_sum(const DeviceGroup& g, const Slot& slot, int kept,
                                             const uint4 (&own)[kBatch], int count, float divisor, Wait wait,
                                             uint64_t pack_index, uint4 (&sums)[kBatch]) {
  if constexpr (kBatch == 1) {
    Accumulator<T> acc;
    const auto only = [&](int r) { return slot(r, 0); };
    if (!take_and_sum<T, kWorld, kClearFirst>(g, only, kept, own[0], wait, pack_index, acc)) return false;
    sums[0] = acc.finish(divisor);
  } else {
    uint4 packs[kBatch][kWorld];
    uint32_t missing;  // a bit per rank
    do {
      missing = 0;
#pragma unroll
      for (int n = 0; n < kBatch; ++n) {
        if (n != 0 && n >= count) continue;
#pragma unroll
        for (int r = 0; r < kWorld; ++r) packs[n][r] = r == kept ? own[n] : ld_relaxed_sys_v4(slot(r, n));
      }
#pragma unroll
      for (int n = 0; n < kBatch; ++n) {
        if (n != 0 && n >= count) continue;
#pragma unroll
        for (int r = 0; r < kWorld; ++r) {
          if (has_sentinel(packs[n][r])) missing |= 1u << r;
        }
      }
      if (missing != 0 && !wait.keep_on(__ffs(missing) - 1, pack_index, kLamportSentinel, missing)) return false;
    } while (missing != 0);
#pragma unroll
    for (int n = 0; n < kBatch; ++n) {
      if (n != 0 && n >= count) continue;
      const auto clear_all = [&] {
#pragma unroll
        for (int r = 0; r < kWorld; ++r) {
          if (r != kept) clear(slot(r, n));
        }
      };
      if constexpr (kClearFirst) clear_all();
      Accumulator<T> acc;
      acc.begin(packs[n][0]);
#pragma unroll
      for (int r = 1; r < kWorld; ++r) acc.add(packs[n][r]);
      sums[n] = acc.finish(divisor);
      if constexpr (!kClearFirst) clear_all();
    }
  }
  return true;
}

}  // namespace mnnvl::kernels
