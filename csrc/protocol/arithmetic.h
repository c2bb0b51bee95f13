// What the reductions compute, element by element: one source for host and device, so that their bits can't differ.
//
// s = x[0] op x[1] op ... op x[n-1], from left to right (rank order), in the wide type of the dtype: float32 for
// floating-point types of 32 bits and fewer, float64 for float64, 32 or 64 bits for integers. AVG divides the sum by n:
// a true division, of integers one that truncates. Then one rounding to the dtype, to nearest even; what is too large
// becomes infinity, in float8_e4m3fn the largest value, 448. In floating point a result of -0 is written as +0 and NaN
// in its canonical bits; a NaN among the inputs of MIN or MAX is the result. Integers wrap. Of bool, any byte but 0 is
// true.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/math.h"
#include "protocol/types.h"

namespace mnnvl::arithmetic {

template <typename To, typename From>
MNNVL_HOST_DEVICE To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

// A small floating-point format: kMantissa bits behind the leading one, exponents biased by kBias. kOverflow: what
// too large a value becomes; kSpecials: whether the highest exponent means infinity and NaN.
template <int kMantissa, int kBias, uint32_t kOverflow, bool kSpecials>
struct SmallFloat {
  static constexpr int kDropped = 23 - kMantissa;
  static constexpr int kWidth = kMantissa + (kBias == 7 ? 4 : 5) + 1;
  static constexpr uint32_t kSign = 1u << (kWidth - 1), kNaN = kSign - 1;

  // Both choose among results instead of ways to them, so that compilers vectorise loops over them.
  static MNNVL_HOST_DEVICE float widen(uint32_t bits) {
    const uint32_t sign = (bits & kSign) << (32 - kWidth), magnitude = bits & (kSign - 1);
    // Zero or subnormal, exact: the unit is 2^(1 - kBias - kMantissa).
    const uint32_t subnormal = bits_as<uint32_t>(float(int32_t(magnitude)) * bits_as<float>(unit_exponent() << 23));
    const uint32_t normal = (magnitude << kDropped) + (uint32_t(127 - kBias) << 23);
    const uint32_t special = kSpecials ? 0x7f800000u | magnitude << kDropped : 0x7fffffffu;
    const uint32_t finite = magnitude >> kMantissa != 0 ? normal : subnormal;
    return bits_as<float>(sign | (magnitude >= (kSpecials ? kOverflow : kNaN) ? special : finite));
  }

  static MNNVL_HOST_DEVICE uint32_t narrow(float v) {
    const uint32_t narrowed = narrow_signed(v);
    return narrowed == kSign ? 0 : narrowed;
  }

  // The same, but -0 stays.
  static MNNVL_HOST_DEVICE uint32_t narrow_signed(float v) {
    const uint32_t bits = bits_as<uint32_t>(v), magnitude = bits & 0x7fffffffu;
    // Normal: round what is dropped; a carry may reach too far.
    const uint32_t shifted = magnitude - (uint32_t(127 - kBias) << 23);
    const uint32_t rounded = (shifted + (1u << (kDropped - 1)) - 1 + (magnitude >> kDropped & 1)) >> kDropped;
    const uint32_t normal = rounded < kOverflow ? rounded : kOverflow;
    // Subnormal: adding a value whose last bit is the unit makes the addition round.
    const float shift = bits_as<float>((unit_exponent() + 23) << 23);
    const uint32_t subnormal = bits_as<uint32_t>(bits_as<float>(magnitude) + shift) - bits_as<uint32_t>(shift);
    const uint32_t small = magnitude >= uint32_t(127 - kBias + 1) << 23 ? normal : subnormal;
    return v != v ? kNaN : small | (bits >> 31) << (kWidth - 1);
  }

 private:
  static MNNVL_HOST_DEVICE constexpr uint32_t unit_exponent() { return uint32_t(127 + 1 - kBias - kMantissa); }
};
using Half = SmallFloat<10, 15, 0x7c00, true>;
using E4M3 = SmallFloat<3, 7, 0x7e, false>;
using E5M2 = SmallFloat<2, 15, 0x7c, true>;

// How an element lies in memory, what it is reduced in, and the way there and back.
template <Dtype dtype>
struct Element;

template <typename StoredType, typename WideType>
struct Integer {
  using Stored = StoredType;
  using Wide = WideType;
  static MNNVL_HOST_DEVICE Wide widen(Stored v) { return Wide(v); }
  static MNNVL_HOST_DEVICE Stored narrow(Wide v) { return Stored(v); }
};
template <>
struct Element<Dtype::kInt8> : Integer<int8_t, int32_t> {};
template <>
struct Element<Dtype::kUInt8> : Integer<uint8_t, int32_t> {};
template <>
struct Element<Dtype::kInt16> : Integer<int16_t, int32_t> {};
template <>
struct Element<Dtype::kInt32> : Integer<int32_t, int32_t> {};
template <>
struct Element<Dtype::kInt64> : Integer<int64_t, int64_t> {};
template <>
struct Element<Dtype::kBool> : Integer<uint8_t, int32_t> {
  static MNNVL_HOST_DEVICE Wide widen(Stored v) { return v != 0 ? 1 : 0; }
};

template <typename Bits, typename Real>
struct WideFloat {
  using Stored = Bits;
  using Wide = Real;
  static MNNVL_HOST_DEVICE Real widen(Bits bits) { return bits_as<Real>(bits); }
  static MNNVL_HOST_DEVICE Bits narrow(Real v) { return v != v ? Bits(-1) >> 1 : v == Real(0) ? 0 : bits_as<Bits>(v); }
};
template <>
struct Element<Dtype::kFloat32> : WideFloat<uint32_t, float> {
#ifdef __CUDA_ARCH__  // the same, in one instruction: -0 + 0 is +0, and what a GPU adds to NaN is the canonical one
  static __device__ __forceinline__ uint32_t narrow(float v) { return __float_as_uint(__fadd_rn(v, 0.0f)); }
#endif
};
template <>
struct Element<Dtype::kFloat64> : WideFloat<uint64_t, double> {};
template <>
struct Element<Dtype::kBFloat16> {
  using Stored = uint16_t;
  using Wide = float;
  static MNNVL_HOST_DEVICE float widen(uint16_t bits) { return bits_as<float>(uint32_t(bits) << 16); }
  static MNNVL_HOST_DEVICE uint16_t narrow(float v) {
    const uint32_t bits = bits_as<uint32_t>(v), half = (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
    return uint16_t(v != v ? 0x7fffu : half == 0x8000u ? 0u : half);
  }
};
template <>
struct Element<Dtype::kFloat16> {
  using Stored = uint16_t;
  using Wide = float;
#ifdef __CUDA_ARCH__  // the same, in one instruction
  static __device__ __forceinline__ float widen(uint16_t bits) {
    float v;
    asm("cvt.f32.f16 %0, %1;" : "=f"(v) : "h"(bits));
    return v;
  }
  static __device__ __forceinline__ uint16_t narrow(float v) {
    uint16_t half;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(v));
    return v != v ? 0x7fffu : half == 0x8000u ? 0u : half;
  }
#else
  static MNNVL_HOST_DEVICE float widen(uint16_t bits) { return Half::widen(bits); }
  static MNNVL_HOST_DEVICE uint16_t narrow(float v) { return uint16_t(Half::narrow(v)); }
#endif
};
template <typename Format>
struct Float8 {
  using Stored = uint8_t;
  using Wide = float;
  static MNNVL_HOST_DEVICE float widen(uint8_t bits) { return Format::widen(bits); }
  static MNNVL_HOST_DEVICE uint8_t narrow(float v) { return uint8_t(Format::narrow(v)); }
};
template <>
struct Element<Dtype::kFloat8E4M3> : Float8<E4M3> {};
template <>
struct Element<Dtype::kFloat8E5M2> : Float8<E5M2> {};

// Signed integers that wrap.
template <typename T>
struct Wrapping {
  using type = T;
};
template <>
struct Wrapping<int32_t> {
  using type = uint32_t;
};
template <>
struct Wrapping<int64_t> {
  using type = uint64_t;
};

template <ReduceOp op, typename Wide>
MNNVL_HOST_DEVICE Wide combine(Wide a, Wide b) {
  using W = typename Wrapping<Wide>::type;
  if constexpr (op == ReduceOp::kSum || op == ReduceOp::kAvg) return Wide(W(a) + W(b));
  if constexpr (op == ReduceOp::kProduct) return Wide(W(a) * W(b));
  if constexpr (op == ReduceOp::kMin) return a != a ? a : b != b ? b : b < a ? b : a;
  if constexpr (op == ReduceOp::kMax) return a != a ? a : b != b ? b : a < b ? b : a;
  if constexpr (op == ReduceOp::kBand) return a & b;
  if constexpr (op == ReduceOp::kBor) return a | b;
  if constexpr (op == ReduceOp::kBxor) return a ^ b;
}

// `count`: of ranks.
template <ReduceOp op, typename Wide>
MNNVL_HOST_DEVICE Wide finish(Wide v, int count) {
  if constexpr (op == ReduceOp::kAvg) return v / Wide(count);
  return v;
}

// The operation that computes it: of bool, sum and maximum are "or", product and minimum "and".
constexpr ReduceOp computed(Dtype dtype, ReduceOp op) {
  if (dtype != Dtype::kBool) return op;
  if (op == ReduceOp::kSum || op == ReduceOp::kMax) return ReduceOp::kBor;
  if (op == ReduceOp::kProduct || op == ReduceOp::kMin) return ReduceOp::kBand;
  return op;
}

// All that is reduced, as computed(): X(dtype, op).
#define MNNVL_FOR_EACH_INTEGER(X, op) \
  X(kInt8, op) \
  X(kUInt8, op) \
  X(kInt16, op) \
  X(kInt32, op) \
  X(kInt64, op)
#define MNNVL_FOR_EACH_FLOAT(X, op) \
  X(kFloat32, op) \
  X(kFloat16, op) \
  X(kBFloat16, op) \
  X(kFloat64, op) \
  X(kFloat8E4M3, op) \
  X(kFloat8E5M2, op)
#define MNNVL_FOR_EACH_NUMBER(X, op) \
  MNNVL_FOR_EACH_FLOAT(X, op) \
  MNNVL_FOR_EACH_INTEGER(X, op)
#define MNNVL_FOR_EACH_SET_OF_BITS(X, op) \
  MNNVL_FOR_EACH_INTEGER(X, op) \
  X(kBool, op)
#define MNNVL_FOR_EACH_REDUCTION(X) \
  MNNVL_FOR_EACH_NUMBER(X, kSum) \
  MNNVL_FOR_EACH_NUMBER(X, kAvg) \
  MNNVL_FOR_EACH_NUMBER(X, kProduct) \
  MNNVL_FOR_EACH_NUMBER(X, kMin) \
  MNNVL_FOR_EACH_NUMBER(X, kMax) \
  MNNVL_FOR_EACH_SET_OF_BITS(X, kBand) \
  MNNVL_FOR_EACH_SET_OF_BITS(X, kBor) \
  MNNVL_FOR_EACH_SET_OF_BITS(X, kBxor)

constexpr bool is_reduced(Dtype dtype, ReduceOp op) {
#define MNNVL_IS(d, o) || (dtype == Dtype::d && computed(dtype, op) == ReduceOp::o)
  return false MNNVL_FOR_EACH_REDUCTION(MNNVL_IS);
#undef MNNVL_IS
}

}  // namespace mnnvl::arithmetic
