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

// Each word for itself, as the protocols of packs ask.
inline void st_relaxed_sys_v4(void* address, uint4 v) {
  auto* words = static_cast<uint32_t*>(address);
  __atomic_store_n(words + 3, v.w, __ATOMIC_RELAXED);
  __atomic_store_n(words + 1, v.y, __ATOMIC_RELAXED);
  emulation::Block::current()->yield();
  __atomic_store_n(words, v.x, __ATOMIC_RELAXED);
  __atomic_store_n(words + 2, v.z, __ATOMIC_RELAXED);
}
inline uint4 ld_relaxed_sys_v4(const void* address) {
  const auto* words = static_cast<const uint32_t*>(address);
  const uint4 v{polled(words, __ATOMIC_RELAXED), __atomic_load_n(words + 1, __ATOMIC_RELAXED),
                __atomic_load_n(words + 2, __ATOMIC_RELAXED), __atomic_load_n(words + 3, __ATOMIC_RELAXED)};
  emulation::interruption.loaded(address);
  return v;
}
inline void multimem_st_relaxed_sys_v4(void*, uint4) { __builtin_trap(); }  // no multicast here
// atomicInc: wraps to 0 behind `most`.
inline uint32_t atom_inc_relaxed_gpu_u32(uint32_t* address, uint32_t most) {
  uint32_t old = __atomic_load_n(address, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(address, &old, old >= most ? 0 : old + 1, false, __ATOMIC_SEQ_CST,
                                      __ATOMIC_RELAXED)) {
  }
  return old;
}

inline void st_relaxed_sys_u32(uint32_t* address, uint32_t v) { __atomic_store_n(address, v, __ATOMIC_RELAXED); }
inline uint32_t ld_relaxed_sys_u32(const uint32_t* address) { return polled(address, __ATOMIC_RELAXED); }
inline void st_release_sys_u32(uint32_t* address, uint32_t v) { __atomic_store_n(address, v, __ATOMIC_RELEASE); }
inline uint32_t ld_acquire_sys_u32(const uint32_t* address) { return polled(address, __ATOMIC_ACQUIRE); }
inline void st_relaxed_sys_u64(void* address, uint64_t v) {
  __atomic_store_n(static_cast<uint64_t*>(address), v, __ATOMIC_RELEASE);  // C++ knows no issue in order
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
inline uint32_t atom_inc_relaxed_cta_u32(uint32_t* shared, uint32_t most) {
  return atom_inc_relaxed_gpu_u32(shared, most);
}
inline void fence_acq_rel_sys() { std::atomic_thread_fence(std::memory_order_seq_cst); }
inline void fence_proxy_alias() {}

// Arrivals that a phase takes; arrivals that the running one lacks; phases that are over. A block is one thread of the
// system, so plain arithmetic between two changes of fiber is atomic.
struct EmulatedBarrier {
  uint16_t arrivals, missing;
  uint32_t phases;
};
inline EmulatedBarrier& emulated(uint64_t* shared) { return *reinterpret_cast<EmulatedBarrier*>(shared); }
inline void mbarrier_init(uint64_t* shared, uint32_t arrivals) {
  emulated(shared) = {uint16_t(arrivals), uint16_t(arrivals), 0};
}
inline void mbarrier_arrive(uint64_t* shared) {
  EmulatedBarrier& barrier = emulated(shared);
  if (--barrier.missing != 0) return;
  barrier.missing = barrier.arrivals;
  ++barrier.phases;
}
inline bool mbarrier_is_over(uint64_t* shared, uint32_t phase) {
  emulation::Block::current()->yield();
  return emulated(shared).phases % 2 != phase % 2;
}
inline void mbarrier_wait(uint64_t* shared, uint32_t phase) {
  while (!mbarrier_is_over(shared, phase)) {
  }
}

inline uint64_t globaltimer_ns() {
  return static_cast<uint64_t>(std::chrono::steady_clock::now().time_since_epoch().count());
}
inline void grid_dependency_wait() {}

}  // namespace mnnvl::kernels
