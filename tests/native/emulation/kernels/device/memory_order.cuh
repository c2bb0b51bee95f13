// In place of csrc/kernels/device/memory_order.cuh: the same accesses on a CPU. Loads, which loops poll, let the other
// threads of the block go on.
#pragma once

#include "native/emulation/cuda.h"

namespace mnnvl::kernels {

template <typename T>
T polled(const T* address, int order) {
  emulation::Block::current()->yield();
  return order == __ATOMIC_ACQUIRE ? __atomic_load_n(address, __ATOMIC_ACQUIRE)
                                   : __atomic_load_n(address, __ATOMIC_RELAXED);
}

inline void st_relaxed_sys_u32(uint32_t* address, uint32_t v) { __atomic_store_n(address, v, __ATOMIC_RELAXED); }
inline uint32_t ld_relaxed_sys_u32(const uint32_t* address) { return polled(address, __ATOMIC_RELAXED); }
inline void st_release_sys_u32(uint32_t* address, uint32_t v) { __atomic_store_n(address, v, __ATOMIC_RELEASE); }
inline uint32_t ld_acquire_sys_u32(const uint32_t* address) { return polled(address, __ATOMIC_ACQUIRE); }
inline void st_release_sys_u64(void* address, uint64_t v) {
  __atomic_store_n(static_cast<uint64_t*>(address), v, __ATOMIC_RELEASE);
}
inline uint64_t ld_acquire_sys_u64(const void* address) {
  return polled(static_cast<const uint64_t*>(address), __ATOMIC_ACQUIRE);
}

// The flag goes last and is read first.
inline void st_relaxed_sys_b128(void* address, uint64_t low, uint64_t high) {
  __atomic_store_n(static_cast<uint64_t*>(address), low, __ATOMIC_RELAXED);
  __atomic_store_n(static_cast<uint64_t*>(address) + 1, high, __ATOMIC_RELEASE);
}
inline void ld_relaxed_sys_b128(const void* address, uint64_t& low, uint64_t& high) {
  high = polled(static_cast<const uint64_t*>(address) + 1, __ATOMIC_ACQUIRE);
  low = __atomic_load_n(static_cast<const uint64_t*>(address), __ATOMIC_RELAXED);
}

inline void st_release_cta_u32(uint32_t* shared, uint32_t v) { st_release_sys_u32(shared, v); }
inline uint32_t ld_acquire_cta_u32(const uint32_t* shared) { return ld_acquire_sys_u32(shared); }

// For one arrival a phase: the word counts phases.
inline void mbarrier_init(uint64_t* shared, uint32_t /*arrivals*/) { *shared = 0; }
inline void mbarrier_arrive(uint64_t* shared) { __atomic_fetch_add(shared, 1, __ATOMIC_RELEASE); }
inline void mbarrier_wait(uint64_t* shared, uint32_t phase) {
  while (polled(shared, __ATOMIC_ACQUIRE) % 2 == phase % 2) {
  }
}

inline uint64_t globaltimer_ns() {
  return static_cast<uint64_t>(std::chrono::steady_clock::now().time_since_epoch().count());
}
inline void grid_dependency_wait() {}

}  // namespace mnnvl::kernels
