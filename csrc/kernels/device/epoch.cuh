// What the epoch kernels share: slots in flight between block b of one rank and block b of every other, with flags
// beside the data. Nothing is assumed of the payload's bits.
//
// Each block has one monotonic epoch e; a step of any collective takes one. Flag [block][source] in the reader's
// signal area holds the last epoch that source has posted. Every rank posts in every step, data or not.
//
// Safety of kPipeDepth = 4 slots (the long form: csrc/README.md): whoever posts epoch e has read its slots up to e-2;
// slot e is written after seeing post e-2 from everyone, who have thus read slot e-4, its last content.
#pragma once

#include "kernels/device/memory_order.cuh"
#include "kernels/device/pack.cuh"
#include "kernels/device/wait.cuh"

namespace mnnvl::kernels {

class EpochPipe {
 public:
  __device__ __forceinline__ EpochPipe(const DeviceGroup& g, Operation operation)
      : g_(g), own_(control_of(g, g.rank)), operation_(operation) {
    epoch_ = own_->pipe_epoch[blockIdx.x];
  }

  __device__ __forceinline__ uint32_t last_epoch() const { return epoch_; }

  // Block-wide. True when the group has failed before, which then is recorded here too.
  __device__ __forceinline__ bool aborted() const {
    bool aborted = false;
    if (threadIdx.x == 0) {
      const uint32_t abort = ld_relaxed_sys_u32(&own_->abort);
      aborted = abort != 0;
      if (aborted) {
        give_up(g_, FailureCause::kPeerFailed, abort_rank(abort), operation_, /*stage=*/0, epoch_, 0, 0);
      }
    }
    return __syncthreads_or(aborted);
  }

  // Where `source`'s piece of step `epoch` stands in `holder`'s workspace.
  __device__ __forceinline__ std::byte* slot(int holder, uint32_t epoch, int source) const {
    const int64_t index = int64_t(blockIdx.x) * kPipeDepth + epoch % kPipeDepth;
    return g_.peers[holder] + g_.layout.pipe_offset + index * g_.layout.pipe_slot_bytes +
           source * g_.layout.pipe_piece_bytes(g_.world_size);
  }

  // Block-wide: tells every peer that this rank's stores of step `epoch` are there. The barrier orders the block's
  // stores before the releases, one thread's for each peer.
  __device__ __forceinline__ void post(uint32_t epoch) const {
    __syncthreads();
    const int peer = threadIdx.x;
    if (peer < g_.world_size && peer != g_.rank) st_release_sys_u32(signal(peer, g_.rank), epoch);
  }

  // Block-wide: waits until every peer has posted `epoch`. False if the wait gave up; the block then leaves the kernel.
  __device__ __forceinline__ bool await(uint32_t epoch) const {
    const int peer = threadIdx.x;
    bool ok = true;
    if (peer < g_.world_size && peer != g_.rank) {
      Wait wait(g_, operation_, /*stage=*/0, epoch);
      uint32_t seen;
      while (ok && !reached(seen = ld_acquire_sys_u32(signal(g_.rank, peer)), epoch)) {
        ok = wait.keep_on(peer, epoch, seen);
      }
    }
    return !__syncthreads_or(!ok);
  }

  __device__ __forceinline__ void finish(uint32_t epoch) const {
    if (threadIdx.x == 0) own_->pipe_epoch[blockIdx.x] = epoch;
  }

 private:
  __device__ __forceinline__ uint32_t* signal(int holder, int source) const {
    const int64_t index = int64_t(blockIdx.x) * kMaxWorldSize + source;
    return reinterpret_cast<uint32_t*>(g_.peers[holder] + g_.layout.signal_offset) + index;
  }

  const DeviceGroup& g_;
  DeviceControl* own_;
  Operation operation_;
  uint32_t epoch_;
};

// Block-wide copy of `bytes` with several loads in flight. `to` may be a peer's memory.
template <typename Unit>
__device__ __forceinline__ void copy_piece(std::byte* to, const std::byte* from, int64_t bytes) {
  constexpr int kInFlight = 4;
  const int64_t step = int64_t(blockDim.x) * kPackBytes;
  if (is_vector_aligned(to) && is_vector_aligned(from)) {
    int64_t at = int64_t(threadIdx.x) * kPackBytes;
    for (; at + (kInFlight - 1) * step + kPackBytes <= bytes; at += kInFlight * step) {
      uint4 packs[kInFlight];
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) packs[i] = *reinterpret_cast<const uint4*>(from + at + i * step);
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) *reinterpret_cast<uint4*>(to + at + i * step) = packs[i];
    }
    for (; at < bytes; at += step) store_pack<Unit>(to + at, bytes - at, load_pack<Unit>(from + at, bytes - at));
    return;
  }
  for (int64_t at = int64_t(threadIdx.x) * sizeof(Unit); at < bytes; at += int64_t(blockDim.x) * sizeof(Unit)) {
    *reinterpret_cast<Unit*>(to + at) = *reinterpret_cast<const Unit*>(from + at);
  }
}

}  // namespace mnnvl::kernels
