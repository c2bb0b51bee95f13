// Enough of CUDA's small floating-point types for csrc/kernels/device/pack.cuh and csrc/kernels/epilogue/.
#pragma once

#include "native/emulation/cuda.h"
#include "protocol/arithmetic.h"

struct __half {
  uint16_t bits;
};
struct __half2 {
  __half low, high;
};
struct __nv_bfloat16 {
  uint16_t bits;
};
struct __nv_bfloat162 {
  __nv_bfloat16 low, high;
};
struct float2 {
  float x, y;
};

inline float __uint_as_float(uint32_t bits) { return mnnvl::arithmetic::bits_as<float>(bits); }
inline uint32_t __float_as_uint(float v) { return mnnvl::arithmetic::bits_as<uint32_t>(v); }
// What a GPU adds to NaN is the canonical one.
inline float __fadd_rn(float a, float b) { return a + b != a + b ? __uint_as_float(0x7fffffffu) : a + b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }

inline float2 __half22float2(__half2 v) {
  using Half = mnnvl::arithmetic::Half;
  return {Half::widen(v.low.bits), Half::widen(v.high.bits)};
}
inline __half2 __float22half2_rn(float2 v) {
  using Half = mnnvl::arithmetic::Half;
  return {{uint16_t(Half::narrow_signed(v.x))}, {uint16_t(Half::narrow_signed(v.y))}};
}
inline __nv_bfloat16 __float2bfloat16_rn(float v) {
  const uint32_t bits = __float_as_uint(v);
  return {uint16_t(v != v ? 0x7fffu : (bits + 0x7fffu + (bits >> 16 & 1)) >> 16)};
}
inline __nv_bfloat162 __float22bfloat162_rn(float2 v) { return {__float2bfloat16_rn(v.x), __float2bfloat16_rn(v.y)}; }

template <typename T>
T __ldcg(const T* p) {
  return *p;
}

// For each half: all ones where they are equal.
inline uint32_t __vcmpeq2(uint32_t a, uint32_t b) {
  return ((a & 0xffffu) == (b & 0xffffu) ? 0xffffu : 0u) | (a >> 16 == b >> 16 ? 0xffff0000u : 0u);
}

enum EmulatedFp8 { __NV_SATFINITE, __NV_E4M3 };
inline uint32_t __nv_cvt_float2_to_fp8x2(float2 v, EmulatedFp8, EmulatedFp8) {
  using E4M3 = mnnvl::arithmetic::E4M3;
  return E4M3::narrow_signed(v.x) | E4M3::narrow_signed(v.y) << 8;
}
