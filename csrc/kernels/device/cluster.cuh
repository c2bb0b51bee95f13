// Warps and clusters of blocks: sums and largest values over the one, barriers and shared memory of the other.
#pragma once

#include <cstdint>

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

// Of this block's cluster.
__device__ __forceinline__ int cluster_rank() {
  int rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
__device__ __forceinline__ int cluster_size() {
  int size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}
// What all threads of the cluster have written before, all see after it.
__device__ __forceinline__ void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.release;\n\tbarrier.cluster.wait.acquire;" ::: "memory");
}
// To the place of another block's shared memory that `mine` is of this one's.
template <typename Word>
__device__ __forceinline__ void store_to_block(Word* mine, int rank, Word value) {
  uint32_t address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;"
      : "=r"(address)
      : "r"(uint32_t(__cvta_generic_to_shared(mine))), "r"(rank));
  if constexpr (sizeof(Word) == 8) {
    asm volatile("st.shared::cluster.b64 [%0], %1;" ::"r"(address), "l"(arithmetic::bits_as<uint64_t>(value))
                 : "memory");
  } else {
    asm volatile("st.shared::cluster.b32 [%0], %1;" ::"r"(address), "r"(arithmetic::bits_as<uint32_t>(value))
                 : "memory");
  }
}

}  // namespace mnnvl::kernels
