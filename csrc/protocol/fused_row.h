// What a fused all-reduce does with a row of the sum, element by element: one source for host and device, so that their
// bits can't differ. Every operation is rounded once; none is contracted.
//
//   s      the sum over the ranks, rounded to T (arithmetic.h)
//   r      s + residual, added in float32 and rounded to T
//   inv    1 / sqrt(sum of r * r / hidden + epsilon), in Wide: float32, for T = float32 float64
//   norm   (r * inv) * (weight_bias + gamma) in Wide, rounded to T; -0 stays
//
// The sum of squares has one order, whatever the strategy, the grid or the number of rows: pack p of a row (16 bytes,
// the last one filled up with zeros) belongs to lane p % kRowLanes. A pack's squares are added one after the other, so
// are these sums of a lane's packs; then lanes are added in pairs, those whose numbers differ in the lowest bit
// first. Zeros change no bit, so a lane without packs need not be there.
//
// Quantised is the rounded norm, widened to float32, n below:
//   kFloat8         e4m3(n * (1 / scale))
//   kDynamicFloat8  e4m3(n / scale of the row), which is max(amax * (1/448), 2^-9 / 448), amax of the row
//   kNVFloat4       blocks of 16: scale = e4m3(global * (amax * (1/6))); e2m1(n * (global / scale)), 0 for 0 / 0
//   kGroupFloat8    scale = max(amax / 448, 1e-10) of the group, up to a power of two; e4m3(n / scale)
// e4m3 and e2m1 round to nearest even and saturate at 448 and 6. NaN stays NaN in e4m3 and is 6 in e2m1; an amax passes
// it over.
#pragma once

#include <cmath>

#include "protocol/arithmetic.h"
#include "protocol/requests.h"

namespace mnnvl::fused {

constexpr int kRowLanes = 1024;
constexpr int kNVBlock = 16;  // elements of a scale of kNVFloat4

// Rounded once each: what a compiler may not make one operation of two. The host's are compiled so.
#ifdef __CUDA_ARCH__
__device__ __forceinline__ float add(float a, float b) { return __fadd_rn(a, b); }
__device__ __forceinline__ float multiply(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ float divide(float a, float b) { return __fdiv_rn(a, b); }
__device__ __forceinline__ float inverse(float a) { return __frcp_rn(a); }
__device__ __forceinline__ float root(float a) { return __fsqrt_rn(a); }
__device__ __forceinline__ float multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }
__device__ __forceinline__ double add(double a, double b) { return __dadd_rn(a, b); }
__device__ __forceinline__ double multiply(double a, double b) { return __dmul_rn(a, b); }
__device__ __forceinline__ double divide(double a, double b) { return __ddiv_rn(a, b); }
__device__ __forceinline__ double inverse(double a) { return __drcp_rn(a); }
__device__ __forceinline__ double root(double a) { return __dsqrt_rn(a); }
__device__ __forceinline__ double multiply_add(double a, double b, double c) { return __fma_rn(a, b, c); }
#else
template <typename Real>
inline Real add(Real a, Real b) {
  return a + b;
}
template <typename Real>
inline Real multiply(Real a, Real b) {
  return a * b;
}
template <typename Real>
inline Real divide(Real a, Real b) {
  return a / b;
}
template <typename Real>
inline Real inverse(Real a) {
  return 1 / a;
}
template <typename Real>
inline Real root(Real a) {
  return std::sqrt(a);
}
template <typename Real>
inline Real multiply_add(Real a, Real b, Real c) {
  return std::fma(a, b, c);
}
#endif

template <Dtype dtype>
struct WideOf {
  using type = float;
};
template <>
struct WideOf<Dtype::kFloat32> {
  using type = double;
};
template <Dtype dtype>
using Wide = typename WideOf<dtype>::type;
template <Dtype dtype>
using Stored = typename arithmetic::Element<dtype>::Stored;

template <Dtype dtype>
MNNVL_HOST_DEVICE float widen(Stored<dtype> bits) {
  return arithmetic::Element<dtype>::widen(bits);
}

// -0 stays; NaN is the canonical one.
template <Dtype dtype>
MNNVL_HOST_DEVICE Stored<dtype> round_signed(Wide<dtype> v) {
  if constexpr (dtype == Dtype::kFloat32) {
    return v != v ? 0x7fffffffu : arithmetic::bits_as<uint32_t>(float(v));
  } else if constexpr (dtype == Dtype::kBFloat16) {
    const uint32_t bits = arithmetic::bits_as<uint32_t>(v);
    return uint16_t(v != v ? 0x7fffu : (bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
  } else {
#ifdef __CUDA_ARCH__
    uint16_t half;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(v));
    return v != v ? uint16_t(0x7fff) : half;
#else
    return uint16_t(arithmetic::Half::narrow_signed(v));
#endif
  }
}

template <Dtype dtype>
MNNVL_HOST_DEVICE Stored<dtype> add_residual(Stored<dtype> sum, Stored<dtype> residual) {
  return arithmetic::Element<dtype>::narrow(add(widen<dtype>(sum), widen<dtype>(residual)));
}

// a / b, by `inverse_of_b`, which is rounded correctly: one step of Newton's makes a quotient that is at most a unit
// off, and the next the right one (Markstein), where nothing on the way is too large or too small.
template <typename Real>
MNNVL_HOST_DEVICE Real quotient(Real a, Real b, Real inverse_of_b) {
  Real q = multiply(a, inverse_of_b);
  q = multiply_add(multiply_add(-q, b, a), inverse_of_b, q);
  return multiply_add(multiply_add(-q, b, a), inverse_of_b, q);
}

// sum / hidden, which is from 1 to 2^31.
template <typename Real>
MNNVL_HOST_DEVICE Real mean_of(Real sum, Real hidden, Real inverse_of_hidden) {
  if (sum > Real(0x1p-80f) && sum < Real(0x1p+127f)) return quotient(sum, hidden, inverse_of_hidden);
  return divide(sum, hidden);
}

template <typename Real>
MNNVL_HOST_DEVICE Real inverse_rms(Real mean_square, float epsilon) {
  return inverse(root(add(mean_square, Real(epsilon))));
}

template <Dtype dtype>
MNNVL_HOST_DEVICE Stored<dtype> normalise(Stored<dtype> element, Wide<dtype> inverse_rms, float gamma,
                                          float weight_bias) {
  using W = Wide<dtype>;
  const W weight = add(W(weight_bias), W(gamma));
  return round_signed<dtype>(multiply(multiply(W(widen<dtype>(element)), inverse_rms), weight));
}

// Larger of an amax so far and |v|; a NaN is passed over.
MNNVL_HOST_DEVICE float amax_of(float amax, float v) {
  const float magnitude = v < 0 ? -v : v;
  return magnitude > amax ? magnitude : amax;
}

MNNVL_HOST_DEVICE uint8_t to_e4m3(float v) { return uint8_t(arithmetic::E4M3::narrow_signed(v)); }

MNNVL_HOST_DEVICE uint8_t to_e2m1(float v) {
  const float m = v < 0 ? -v : v;
  const int code = (m > 0.25f) + (m >= 0.75f) + (m > 1.25f) + (m >= 1.75f) + (m > 2.5f) + (m >= 3.5f) + (m > 5.0f);
  const uint32_t sign = arithmetic::bits_as<uint32_t>(v) >> 31 << 3;
  return uint8_t(v != v ? 7u : sign | uint32_t(code));
}

// By the rounded 1/448, as torch on CUDA divides by a number, and so FlashInfer's references: rows whose scale would be
// a power of two have many ties, which a scale that is one unit off breaks.
MNNVL_HOST_DEVICE float dynamic_scale(float amax) {
  const float scale = multiply(amax, 1.0f / 448.0f), least = divide(1.0f / 512.0f, 448.0f);
  return scale > least ? scale : least;
}

MNNVL_HOST_DEVICE float nv_scale_wanted(float amax, float global) {
  return multiply(global, multiply(amax, 1.0f / 6.0f));
}
MNNVL_HOST_DEVICE uint8_t nv_scale(float amax, float global) { return to_e4m3(nv_scale_wanted(amax, global)); }
MNNVL_HOST_DEVICE float nv_factor(uint8_t scale, float global) {
  return (scale & 0x7f) == 0 ? 0.0f : divide(global, arithmetic::E4M3::widen(scale));
}

// A power of two, or infinity.
MNNVL_HOST_DEVICE float group_scale(float amax) {
  const float ratio = divide(amax, 448.0f), scale = ratio > 1e-10f ? ratio : 1e-10f;
  const uint32_t bits = arithmetic::bits_as<uint32_t>(scale);
  return arithmetic::bits_as<float>((bits & 0x7fffffu) == 0 ? bits : (bits & 0x7f800000u) + 0x800000u);
}
MNNVL_HOST_DEVICE uint8_t exponent_of(float scale) { return uint8_t(arithmetic::bits_as<uint32_t>(scale) >> 23); }

// Where scales lie, in bytes. What a row has is counted in 32 bits, which a GPU divides in a fifth of the instructions.
// kNVFloat4: of block `block` of a row. Swizzled: tiles of 128 rows and 4 blocks, and both are rounded up to whole
// tiles, whose padding is zero.
MNNVL_HOST_DEVICE constexpr uint32_t nv_blocks(const RowWork& w) { return uint32_t(w.hidden) / kNVBlock; }
MNNVL_HOST_DEVICE constexpr int64_t swizzled_offset(int64_t row, uint32_t block, uint32_t blocks) {
  return (row / 128 * ((blocks + 3) / 4) + block / 4) * 512 + row % 32 * 16 + row % 128 / 32 * 4 + block % 4;
}
MNNVL_HOST_DEVICE constexpr int64_t nv_scale_offset(const RowWork& w, int64_t row, uint32_t block) {
  return w.layout == ScaleLayout::kLinear ? row * nv_blocks(w) + block : swizzled_offset(row, block, nv_blocks(w));
}
// kGroupFloat8: int32 words of four groups each, [rows, words] with strides [1, rows rounded up to 4]: byte j of word c
// of a row is the exponent of group 4c + j, 0 where there is none. The last column has `rows` words only.
MNNVL_HOST_DEVICE constexpr uint32_t groups(const RowWork& w) { return uint32_t(w.hidden) / uint32_t(w.group); }
MNNVL_HOST_DEVICE constexpr uint32_t group_words(const RowWork& w) { return (groups(w) + 3) / 4; }
MNNVL_HOST_DEVICE constexpr int64_t group_scale_offset(const RowWork& w, int64_t row, uint32_t group) {
  return (group / 4 * align_up(w.rows, 4) + row) * 4 + group % 4;
}

// Scales that belong to no element, as zeros: calls zero(byte offset, bytes) for each run of them, four bytes or fewer,
// of which run number i is the caller's if i % step == begin.
template <typename Zero>
MNNVL_HOST_DEVICE void each_padding(const RowWork& w, uint32_t begin, uint32_t step, const Zero& zero) {
  if (w.quantization == Quantization::kNVFloat4 && w.layout == ScaleLayout::kSwizzled128x4) {
    const uint32_t blocks = nv_blocks(w), columns = (blocks + 3) / 4, below = uint32_t(align_up(w.rows, 128) - w.rows);
    for (uint32_t i = begin; i < below * columns; i += step) {
      zero(swizzled_offset(w.rows + i / columns, i % columns * 4, blocks), 4);
    }
    const int right = int(columns * 4 - blocks);
    for (int64_t i = begin; right != 0 && i < w.rows; i += step) zero(swizzled_offset(i, blocks, blocks), right);
  }
  if (w.quantization == Quantization::kGroupFloat8) {
    const uint32_t words = group_words(w), below = uint32_t(align_up(w.rows, 4) - w.rows);
    for (uint32_t i = begin; i < below * (words - 1); i += step) {
      zero(group_scale_offset(w, w.rows + i % below, i / below * 4), 4);
    }
    const int right = int(words * 4 - groups(w));
    for (int64_t i = begin; right != 0 && i < w.rows; i += step) zero(group_scale_offset(w, i, groups(w)), right);
  }
}

}  // namespace mnnvl::fused
