// Warps and clusters of blocks: sums and largest values over the one, barriers and shared memory of the other.
#pragma once

#include <cstdint>

#include "kernels/device/memory_order.cuh"
#include "protocol/fused_row.h"

namespace mnnvl::kernels {

constexpr unsigned kWholeWarp = 0xffffffffu;

// Adds in pairs of lanes, the lowest bit first: every lane gets the sum.
template <typename Real>
__device__ __forceinline__ Real warp_sum(Real v) {
#pragma unroll
  for (int apart = 1; apart < 32; apart *= 2) v = fused::add(v, __shfl_xor_sync(kWholeWarp, v, apart));
  return v;
}
// Over groups of `lanes` neighbours, a power of two.
__device__ __forceinline__ float warp_max(float v, int lanes) {
  for (int apart = 1; apart < lanes; apart *= 2) v = fused::amax_of(v, __shfl_xor_sync(kWholeWarp, v, apart));
  return v;
}

// In two halves: what all threads of the cluster have written before the first, all see after the second. A release is
// a fence of the whole GPU; what needs none begins relaxed.
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.release;" ::: "memory"); }
__device__ __forceinline__ void cluster_arrive_relaxed() {
  asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }
// Both, of one block too.
__device__ __forceinline__ void cluster_barrier(int blocks) {
  if (blocks == 1) {
    __syncthreads();
  } else {
    cluster_arrive();
    cluster_wait();
  }
}

// A value of each warp of a cluster at all its blocks, twice, as rounds take turns: in shared memory, at the same place
// in all blocks. Values are stored in the other block and counted there in one (`st.async`), so nobody's other stores
// are waited for, as a barrier of the cluster would. A single block is none for these instructions: it takes plain
// stores and its own barrier.
//
// A value of round n + 2 lands where those of round n were. Its warp has all of round n + 1 then, of every warp, and
// each has sent that behind its reads of round n. So what is there has been read, and the barrier's phase is that of
// round n + 2. That is why all warps send, those that have nothing too, where there is more than one round. A block
// gets all that is sent to it before it can end.
template <typename Word>
struct ClusterValues {
  Word values[2][32];
  uint64_t arrived[2];  // mbarriers: thread 0, and the bytes of all values

  // One thread of each of several blocks, before cluster_arrive_relaxed().
  __device__ __forceinline__ void prepare() {
    mbarrier_init(&arrived[0], 1);
    mbarrier_init(&arrived[1], 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  // By all threads, first in every round: how many values will come to this one of `blocks`.
  __device__ __forceinline__ void expect(uint32_t round, int blocks, int count) {
    if (blocks == 1 || threadIdx.x != 0) return;
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(address_of(&arrived[round % 2])),
                 "r"(uint32_t(count * int(sizeof(Word))))
                 : "memory");
  }
  // By a whole warp: `value` to `place` in each of `blocks`.
  __device__ __forceinline__ void send(uint32_t round, int blocks, int place, Word value) {
    const int lane = int(threadIdx.x) % 32;
    if (lane >= blocks) return;
    if (blocks == 1) {
      values[round % 2][place] = value;
      return;
    }
    const uint32_t to = address_of(&values[round % 2][place], lane), counter = address_of(&arrived[round % 2], lane);
    if constexpr (sizeof(Word) == 8) {
      asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b64 [%0], %1, [%2];" ::"r"(to),
                   "l"(arithmetic::bits_as<uint64_t>(value)), "r"(counter)
                   : "memory");
    } else {
      asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(to),
                   "r"(arithmetic::bits_as<uint32_t>(value)), "r"(counter)
                   : "memory");
    }
  }
  // By all threads. Until all are there: each lane gets that of its number.
  __device__ __forceinline__ Word take(uint32_t round, int blocks) {
    if (blocks == 1) {
      __syncthreads();
    } else {
      mbarrier_wait_cluster(&arrived[round % 2], round / 2);
    }
    return values[round % 2][threadIdx.x % 32];
  }
  // The same of a single block's team of `threads`, which has the values for itself.
  __device__ __forceinline__ Word take_of_team(uint32_t round, int team, int threads) {
    asm volatile("barrier.sync %0, %1;" ::"r"(team + 1), "r"(threads) : "memory");  // 0 is the block's own
    return values[round % 2][threadIdx.x % 32];
  }

 private:
  __device__ __forceinline__ static uint32_t address_of(const void* shared) {
    return uint32_t(__cvta_generic_to_shared(shared));
  }
  __device__ __forceinline__ static uint32_t address_of(const void* shared, int rank) {
    uint32_t address;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(address_of(shared)), "r"(rank));
    return address;
  }
};

}  // namespace mnnvl::kernels
