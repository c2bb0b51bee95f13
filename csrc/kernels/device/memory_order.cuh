// Every access that another rank or another block may race with, named op_order_scope_type. Ordered and volatile ones
// carry a "memory" clobber.
#pragma once

#include <cstdint>

namespace mnnvl::kernels {

__device__ __forceinline__ void st_relaxed_sys_v4(void* address, uint4 v) {
  asm volatile("st.relaxed.sys.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(v.x), "r"(v.y), "r"(v.z),
               "r"(v.w)
               : "memory");
}

// One store that the switch copies to every rank's memory.
__device__ __forceinline__ void multimem_st_relaxed_sys_v4(void* address, uint4 v) {
  asm volatile("multimem.st.relaxed.sys.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(address),
               "f"(__uint_as_float(v.x)), "f"(__uint_as_float(v.y)), "f"(__uint_as_float(v.z)),
               "f"(__uint_as_float(v.w))
               : "memory");
}

__device__ __forceinline__ uint4 ld_relaxed_sys_v4(const void* address) {
  uint4 v;
  asm volatile("ld.relaxed.sys.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(address)
               : "memory");
  return v;
}

__device__ __forceinline__ void st_relaxed_sys_u32(uint32_t* address, uint32_t v) {
  asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(address), "r"(v) : "memory");
}

__device__ __forceinline__ uint32_t ld_relaxed_sys_u32(const uint32_t* address) {
  uint32_t v;
  asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(v) : "l"(address) : "memory");
  return v;
}

__device__ __forceinline__ void st_release_sys_u32(uint32_t* address, uint32_t v) {
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(address), "r"(v) : "memory");
}

__device__ __forceinline__ uint32_t ld_acquire_sys_u32(const uint32_t* address) {
  uint32_t v;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(v) : "l"(address) : "memory");
  return v;
}

__device__ __forceinline__ void st_relaxed_sys_u64(void* address, uint64_t v) {
  asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(address), "l"(v) : "memory");
}

__device__ __forceinline__ uint64_t ld_acquire_sys_u64(const void* address) {
  uint64_t v;
  asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(v) : "l"(address) : "memory");
  return v;
}

// One access of 16 bytes: whoever sees one half sees the other (a v4.u32 is four accesses).
__device__ __forceinline__ void st_relaxed_sys_b128(void* address, uint64_t low, uint64_t high) {
  asm volatile(
      "{ .reg .b128 v;\n\t"
      "mov.b128 v, {%1, %2};\n\t"
      "st.relaxed.sys.global.b128 [%0], v; }" ::"l"(address),
      "l"(low), "l"(high)
      : "memory");
}

__device__ __forceinline__ void ld_relaxed_sys_b128(const void* address, uint64_t& low, uint64_t& high) {
  asm volatile(
      "{ .reg .b128 v;\n\t"
      "ld.relaxed.sys.global.b128 v, [%2];\n\t"
      "mov.b128 {%0, %1}, v; }"
      : "=l"(low), "=l"(high)
      : "l"(address)
      : "memory");
}

// Among the warps of a block, in shared memory.
__device__ __forceinline__ void st_release_cta_u32(uint32_t* shared, uint32_t v) {
  asm volatile("st.release.cta.shared.u32 [%0], %1;" ::"r"(uint32_t(__cvta_generic_to_shared(shared))), "r"(v)
               : "memory");
}
__device__ __forceinline__ uint32_t ld_acquire_cta_u32(const uint32_t* shared) {
  uint32_t v;
  asm volatile("ld.acquire.cta.shared.u32 %0, [%1];"
               : "=r"(v)
               : "r"(uint32_t(__cvta_generic_to_shared(shared)))
               : "memory");
  return v;
}

// Counts up to `wrap` and back to 0.
__device__ __forceinline__ uint32_t atom_inc_relaxed_cta_u32(uint32_t* shared, uint32_t wrap) {
  uint32_t old;
  asm volatile("atom.relaxed.cta.shared.inc.u32 %0, [%1], %2;"
               : "=r"(old)
               : "r"(uint32_t(__cvta_generic_to_shared(shared))), "r"(wrap)
               : "memory");
  return old;
}

__device__ __forceinline__ void fence_acq_rel_sys() { asm volatile("fence.acq_rel.sys;" ::: "memory"); }
// Between accesses to one place by two addresses: its own, and that of a multicast object.
__device__ __forceinline__ void fence_proxy_alias() { asm volatile("fence.proxy.alias;" ::: "memory"); }

// A barrier object in shared memory: phase n is over when `arrivals` threads have arrived n+1 times. Arriving releases,
// waiting acquires; who waits sleeps.
__device__ __forceinline__ void mbarrier_init(uint64_t* shared, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(uint32_t(__cvta_generic_to_shared(shared))), "r"(arrivals)
               : "memory");
}
__device__ __forceinline__ void mbarrier_arrive(uint64_t* shared) {
  asm volatile("mbarrier.arrive.release.cta.shared.b64 _, [%0];" ::"r"(uint32_t(__cvta_generic_to_shared(shared)))
               : "memory");
}
__device__ __forceinline__ void mbarrier_wait(uint64_t* shared, uint32_t phase) {
  uint32_t over = 0;
  while (over == 0) {
    asm volatile(
        "{ .reg .pred p;\n\t"
        "mbarrier.try_wait.parity.acquire.cta.shared.b64 p, [%1], %2;\n\t"
        "selp.u32 %0, 1, 0, p; }"
        : "=r"(over)
        : "r"(uint32_t(__cvta_generic_to_shared(shared))), "r"(phase & 1)
        : "memory");
  }
}

// What other blocks of the cluster have stored, too.
__device__ __forceinline__ void mbarrier_wait_cluster(uint64_t* shared, uint32_t phase) {
  uint32_t over = 0;
  while (over == 0) {
    asm volatile(
        "{ .reg .pred p;\n\t"
        "mbarrier.try_wait.parity.acquire.cluster.shared.b64 p, [%1], %2;\n\t"
        "selp.u32 %0, 1, 0, p; }"
        : "=r"(over)
        : "r"(uint32_t(__cvta_generic_to_shared(shared))), "r"(phase & 1)
        : "memory");
  }
}
// The same without waiting.
__device__ __forceinline__ bool mbarrier_is_over(uint64_t* shared, uint32_t phase) {
  uint32_t over;
  asm volatile(
      "{ .reg .pred p;\n\t"
      "mbarrier.test_wait.parity.acquire.cta.shared.b64 p, [%1], %2;\n\t"
      "selp.u32 %0, 1, 0, p; }"
      : "=r"(over)
      : "r"(uint32_t(__cvta_generic_to_shared(shared))), "r"(phase & 1)
      : "memory");
  return over != 0;
}

// Counts up to `wrap` and back to 0; relaxed, device scope.
__device__ __forceinline__ uint32_t atom_inc_relaxed_gpu_u32(uint32_t* address, uint32_t wrap) {
  uint32_t old;
  asm volatile("atom.relaxed.gpu.global.inc.u32 %0, [%1], %2;" : "=r"(old) : "l"(address), "r"(wrap) : "memory");
  return old;
}

__device__ __forceinline__ uint64_t globaltimer_ns() {
  uint64_t t;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t)::"memory");
  return t;
}

// Programmatic dependent launch: returns once the preceding kernel has completed and its writes are visible. Without
// the launch attribute it returns at once, the stream having ordered the kernels already.
__device__ __forceinline__ void grid_dependency_wait() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

}  // namespace mnnvl::kernels
