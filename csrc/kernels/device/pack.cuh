// 16-byte packs: loading and storing them at any alignment, -0 removal, and float32 arithmetic on their elements.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "protocol/workspace.h"

namespace mnnvl::kernels {

template <typename T>
constexpr int kPackElements = kPackBytes / int(sizeof(T));

// Any type of the given size can be moved; user tensors may start at any element.
template <typename Unit>
__device__ __forceinline__ void copy_units(void* to, const void* from, int count) {
  for (int i = 0; i < count; ++i) static_cast<Unit*>(to)[i] = static_cast<const Unit*>(from)[i];
}

__device__ __forceinline__ bool is_vector_aligned(const void* p) {
  return reinterpret_cast<uintptr_t>(p) % kPackBytes == 0;
}

// Loads `valid` bytes (1..16) at `p`, the rest zero. Unit is the largest access that p's alignment is known to allow.
template <typename Unit>
__device__ __forceinline__ uint4 load_pack(const std::byte* p, int64_t valid) {
  if (is_vector_aligned(p) && valid >= kPackBytes) return *reinterpret_cast<const uint4*>(p);
  alignas(16) Unit units[kPackBytes / sizeof(Unit)];
#pragma unroll
  for (int i = 0; i < int(kPackBytes / sizeof(Unit)); ++i) {
    const bool there = int64_t((i + 1) * sizeof(Unit)) <= valid;
    units[i] = there ? reinterpret_cast<const Unit*>(p)[i] : Unit(0);
  }
  return *reinterpret_cast<uint4*>(units);
}

template <typename Unit>
__device__ __forceinline__ void store_pack(std::byte* p, int64_t valid, uint4 pack) {
  if (is_vector_aligned(p) && valid >= kPackBytes) {
    *reinterpret_cast<uint4*>(p) = pack;
    return;
  }
  alignas(16) Unit units[kPackBytes / sizeof(Unit)];
  *reinterpret_cast<uint4*>(units) = pack;
#pragma unroll
  for (int i = 0; i < int(kPackBytes / sizeof(Unit)); ++i) {
    if (int64_t((i + 1) * sizeof(Unit)) <= valid) reinterpret_cast<Unit*>(p)[i] = units[i];
  }
}

// The integer of an element's size: the unit in which tensors of T are moved.
template <typename T>
struct UnitOf {
  using type = uint16_t;
};
template <>
struct UnitOf<float> {
  using type = uint32_t;
};
template <typename T>
using Unit = typename UnitOf<T>::type;

// -0 becomes +0 by its bits, so that no published word can be the sentinel. No float compare: subnormals stay.
template <typename T>
__device__ __forceinline__ uint32_t without_negative_zero(uint32_t word) {
  return word & ~__vcmpeq2(word, 0x80008000u);
}
template <>
__device__ __forceinline__ uint32_t without_negative_zero<float>(uint32_t word) {
  return word == 0x80000000u ? 0u : word;
}
template <typename T>
__device__ __forceinline__ uint4 without_negative_zero(uint4 p) {
  return {without_negative_zero<T>(p.x), without_negative_zero<T>(p.y), without_negative_zero<T>(p.z),
          without_negative_zero<T>(p.w)};
}

__device__ __forceinline__ bool has_sentinel(uint4 p) {
  return p.x == kLamportSentinel || p.y == kLamportSentinel || p.z == kLamportSentinel || p.w == kLamportSentinel;
}
__device__ __forceinline__ uint4 sentinel_pack() {
  return {kLamportSentinel, kLamportSentinel, kLamportSentinel, kLamportSentinel};
}

template <typename T>
__device__ __forceinline__ float2 unpack(uint32_t word);
template <>
__device__ __forceinline__ float2 unpack<__half>(uint32_t word) {
  return __half22float2(*reinterpret_cast<__half2*>(&word));
}
template <>
__device__ __forceinline__ float2 unpack<__nv_bfloat16>(uint32_t word) {
  return {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)};
}

template <typename T>
__device__ __forceinline__ uint32_t round_pair(float2 v);
template <>
__device__ __forceinline__ uint32_t round_pair<__half>(float2 v) {
  __half2 h = __float22half2_rn(v);
  return *reinterpret_cast<uint32_t*>(&h);
}
template <>
__device__ __forceinline__ uint32_t round_pair<__nv_bfloat16>(float2 v) {
  __nv_bfloat162 h = __float22bfloat162_rn(v);
  return *reinterpret_cast<uint32_t*>(&h);
}

// A float32 sum for every element of a pack, begun with the first rank's values and added to in rank order.
template <typename T>
struct Accumulator {
  float sum[kPackElements<T>];

  __device__ __forceinline__ static void expand(uint4 p, float (&v)[kPackElements<T>]) {
    const uint32_t words[4] = {p.x, p.y, p.z, p.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (sizeof(T) == 4) {
        v[i] = __uint_as_float(words[i]);
      } else {
        const float2 pair = unpack<T>(words[i]);
        v[2 * i] = pair.x;
        v[2 * i + 1] = pair.y;
      }
    }
  }

  __device__ __forceinline__ void begin(uint4 p) { expand(p, sum); }

  __device__ __forceinline__ void add(uint4 p) {
    float v[kPackElements<T>];
    expand(p, v);
#pragma unroll
    for (int i = 0; i < kPackElements<T>; ++i) sum[i] = __fadd_rn(sum[i], v[i]);
  }

  // Divides by `divisor` (1 for a sum), rounds once, turns -0 into +0.
  __device__ __forceinline__ uint4 finish(float divisor) const {
    float v[kPackElements<T>];
#pragma unroll
    for (int i = 0; i < kPackElements<T>; ++i) v[i] = divisor == 1.0f ? sum[i] : __fdiv_rn(sum[i], divisor);
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (sizeof(T) == 4) {
        words[i] = __float_as_uint(v[i]);
      } else {
        words[i] = round_pair<T>({v[2 * i], v[2 * i + 1]});
      }
      words[i] = without_negative_zero<T>(words[i]);
    }
    return {words[0], words[1], words[2], words[3]};
  }
};

}  // namespace mnnvl::kernels
