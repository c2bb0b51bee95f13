#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define MNNVL_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define MNNVL_HOST_DEVICE inline
#endif

namespace mnnvl {

MNNVL_HOST_DEVICE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
MNNVL_HOST_DEVICE constexpr int64_t align_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
MNNVL_HOST_DEVICE constexpr int64_t align_down(int64_t a, int64_t b) { return a / b * b; }
MNNVL_HOST_DEVICE constexpr int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
MNNVL_HOST_DEVICE constexpr int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

// Wrap-safe order of monotonic 32-bit epochs: true when `epoch` has reached `target`.
MNNVL_HOST_DEVICE constexpr bool reached(uint32_t epoch, uint32_t target) {
  return static_cast<int32_t>(epoch - target) >= 0;
}

}  // namespace mnnvl
