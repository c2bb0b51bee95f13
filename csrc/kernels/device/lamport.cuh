// What the Lamport kernels share: the generation of a call, its clearing, polling for packs.
//
// Safety of three generations (the long form: csrc/README.md). Rank A clears generation g-1 during call g. A peer writes
// into that memory again in call g+2, which it enters only after finishing call g+1, which needs data that A sent in call
// g+1, after A's call g had completed and with it the clearing. The kernel boundary orders A's clearing before A's sends.
//
// Progress: a block waits only for packs that the blocks of the same index publish, and those publish before they wait. The
// grid is one block a multiprocessor at most (kernels of several groups must find room beside each other), and the same on
// every rank.
#pragma once

#include "kernels/device/memory_order.cuh"
#include "kernels/device/pack.cuh"
#include "kernels/device/wait.cuh"

namespace mnnvl::kernels {

class LamportCall {
 public:
  // Reads this rank's state. Every thread of the grid makes one.
  __device__ __forceinline__ explicit LamportCall(const DeviceGroup& g) : g_(g), own_(control_of(g, g.rank)) {
    const uint4 head = ld_relaxed_sys_v4(own_);
    const uint4 dirty = ld_relaxed_sys_v4(own_->dirty_bytes);
    generation_ = head.x;
    abort_ = head.y;
    calls_ = head.z;
    dirty_[0] = uint64_t(dirty.y) << 32 | dirty.x;
    dirty_[1] = uint64_t(dirty.w) << 32 | dirty.z;
  }

  // True when the group has failed before, which then is recorded here too: this rank may not have waited for anybody.
  __device__ __forceinline__ bool aborted() const {
    if (abort_ == 0) return false;
    give_up(g_, FailureCause::kPeerFailed, abort_rank(abort_), Operation::kAllReduce, /*stage=*/0, calls_, 0, 0);
    return true;
  }
  __device__ __forceinline__ uint32_t sequence() const { return calls_; }

  // Offset of a stage of this call's generation in every rank's workspace.
  __device__ __forceinline__ int64_t stage(int s) const { return stage_of(generation_, s); }

  // Block-wide, once, after the block's first stores: clears what the previous call left, and lets the last block to get
  // here write the state of the next call. Every thread's loads of the state have returned before its block's barrier
  // (its stores' addresses needed them), so the new state can't be seen by a block of this call.
  __device__ __forceinline__ void clear_and_advance(uint64_t stage0_bytes, uint64_t stage1_bytes) {
    const int64_t thread = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    const int64_t threads = int64_t(gridDim.x) * blockDim.x;
    const uint32_t previous = generation_ == 0 ? kGenerations - 1 : generation_ - 1;
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      uint4* stale = reinterpret_cast<uint4*>(g_.peers[g_.rank] + stage_of(previous, s));
      for (int64_t i = thread; i < int64_t(dirty_[s] / kPackBytes); i += threads) stale[i] = sentinel_pack();
    }
    __syncthreads();
    if (threadIdx.x != 0) return;
    if (atom_inc_relaxed_gpu_u32(&own_->arrivals, gridDim.x - 1) != gridDim.x - 1) return;
    own_->generation = generation_ == kGenerations - 1 ? 0 : generation_ + 1;
    own_->calls = calls_ + 1;
    own_->dirty_bytes[0] = stage0_bytes;
    own_->dirty_bytes[1] = stage1_bytes;
  }

 private:
  __device__ __forceinline__ int64_t stage_of(uint32_t generation, int s) const {
    return generation * g_.layout.generation_bytes + s * (g_.layout.generation_bytes / 2);
  }

  const DeviceGroup& g_;
  DeviceControl* own_;
  uint64_t dirty_[2];
  uint32_t generation_, abort_, calls_;
};

// Stores a pack at `offset` of every other rank's workspace: one multicast store, or one store each. Starts with the next
// rank, so that not all ranks store to the same one first.
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

// Waits for the packs of all other ranks, the one of rank r at `first + r * stride`, and sums them with `own` in rank
// order. False if the wait gave up.
template <typename T, int kWorld>
__device__ __forceinline__ bool await_and_sum(const DeviceGroup& g, const std::byte* first, int64_t stride, uint4 own,
                                              Wait wait, uint64_t pack_index, Accumulator<T>& acc) {
  if constexpr (kWorld != 0) {
    // All ranks' loads in flight at once; the own value stays in registers.
    uint4 packs[kWorld];
    uint32_t missing;  // a bit per rank
    do {
      missing = 0;
#pragma unroll
      for (int r = 0; r < kWorld; ++r) packs[r] = r == g.rank ? own : ld_relaxed_sys_v4(first + r * stride);
#pragma unroll
      for (int r = 0; r < kWorld; ++r) {
        if (has_sentinel(packs[r])) missing |= 1u << r;
      }
      if (missing != 0 && !wait.keep_on(__ffs(missing) - 1, pack_index, kLamportSentinel, missing)) return false;
    } while (missing != 0);
    acc.begin(packs[0]);
#pragma unroll
    for (int r = 1; r < kWorld; ++r) acc.add(packs[r]);
  } else {
    for (int r = 0; r < g.world_size; ++r) {
      uint4 pack = own;
      if (r != g.rank) {
        while (has_sentinel(pack = ld_relaxed_sys_v4(first + r * stride))) {
          if (!wait.keep_on(r, pack_index, kLamportSentinel)) return false;
        }
      }
      if (r == 0) {
        acc.begin(pack);
      } else {
        acc.add(pack);
      }
    }
  }
  return true;
}

}  // namespace mnnvl::kernels
