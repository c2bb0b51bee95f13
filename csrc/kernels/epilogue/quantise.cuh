// What is written of a normalised row beside the norm itself: its quantisations, a pack at a time, by the thread that
// has it. csrc/protocol/fused_row.h says what they are.
#pragma once

#include <cuda_fp8.h>

#include <type_traits>

#include "kernels/device/cluster.cuh"
#include "kernels/device/pack.cuh"
#include "kernels/kernels.h"
#include "protocol/fused_row.h"

namespace mnnvl::kernels {

template <typename T>
constexpr Dtype kDtype = sizeof(T) == 4 ? Dtype::kFloat32 : Dtype::kBFloat16;
template <>
constexpr Dtype kDtype<__half> = Dtype::kFloat16;

// Two values as e4m3, the first in the low byte.
__device__ __forceinline__ uint32_t e4m3_pair(float a, float b) {
  return __nv_cvt_float2_to_fp8x2({a, b}, __NV_SATFINITE, __NV_E4M3);
}

// The first `valid` of kBytes bytes. kPacked: all, and aligned.
template <int kBytes, bool kPacked = false>
__device__ __forceinline__ void store_bytes(std::byte* p, int64_t valid, uint64_t bytes) {
  using Whole = std::conditional_t<kBytes == 8, uint64_t, uint32_t>;
  static_assert(kBytes == sizeof(Whole));
  if constexpr (kPacked) {
    *reinterpret_cast<Whole*>(p) = Whole(bytes);
  } else if (valid >= kBytes && reinterpret_cast<uintptr_t>(p) % kBytes == 0) {
    *reinterpret_cast<Whole*>(p) = Whole(bytes);
  } else {
#pragma unroll
    for (int i = 0; i < kBytes; ++i) {
      if (i < valid) p[i] = std::byte(bytes >> (8 * i) & 0xff);
    }
  }
}

// Behind the row's end is zero, or NaN, which an amax passes over.
template <typename T>
__device__ __forceinline__ float pack_amax(uint4 norm) {
  float v[kPackElements<T>], amax = 0;
  Accumulator<T>::expand(norm, v);
#pragma unroll
  for (int e = 0; e < kPackElements<T>; ++e) amax = fused::amax_of(amax, v[e]);
  return amax;
}

constexpr bool writes_scales(Quantization quantization) {
  return quantization != Quantization::kNone && quantization != Quantization::kFloat8;
}

// kScaled: also what writes scales.
template <typename T, bool kPacked, bool kScaled>
class RowQuantiser {
 public:
  static constexpr int kElements = kPackElements<T>;

  __device__ __forceinline__ RowQuantiser(const FusedParams& params) : p_(params), w_(params.work) {}

  // What all rows want.
  __device__ __forceinline__ void prepare() {
    if (w_.quantization == Quantization::kNone) return;
    scale_ = w_.scale != nullptr ? *w_.scale : w_.scale_value;
    if (w_.quantization == Quantization::kFloat8) factor_ = fused::inverse(scale_);
  }

  // Of dynamic FP8, before write(): the row's scale.
  __device__ __forceinline__ float take_row_amax(float amax) {
    row_scale_ = fused::dynamic_scale(amax);
    row_inverse_ = fused::inverse(row_scale_);
    return row_scale_;
  }

  // By all threads of a warp, for neighbouring packs; those behind the row's end are zero. `norm_of(element)`: of any
  // element of the row.
  template <typename NormOf>
  __device__ __forceinline__ void write(int row, int i, uint4 norm, const NormOf& norm_of) const {
    float v[kElements];
    Accumulator<T>::expand(norm, v);
    if (!kScaled || w_.quantization == Quantization::kFloat8) {
      return write_float8(row, i, v, [&](int, float x) { return fused::multiply(x, factor_); });
    }
    switch (w_.quantization) {
      case Quantization::kNone:
      case Quantization::kFloat8: return;
      case Quantization::kDynamicFloat8: return write_float8(row, i, v, [&](int, float x) { return by_row_scale(x); });
      case Quantization::kGroupFloat8: return write_groups(row, i, norm, v, norm_of);
      case Quantization::kNVFloat4:
        if constexpr (sizeof(T) == 2) write_nv_float4(row, i, norm, v);
        return;
    }
  }

 private:
  // x / row_scale_. Where this is too small for quotient(), its e4m3 is 0 either way.
  __device__ __forceinline__ float by_row_scale(float x) const {
    const float quotient = copysignf(fused::quotient(x, row_scale_, row_inverse_), x);  // of -0 it would be +0
    return row_inverse_ == 0 ? fused::multiply(x, 0.0f) : quotient;  // the scale is infinite
  }

  template <typename Scaled>
  __device__ __forceinline__ void write_float8(int row, int i, const float (&v)[kElements],
                                               const Scaled& scaled) const {
    if (i >= p_.packs) return;
    uint64_t bytes = 0;
#pragma unroll
    for (int e = 0; e < kElements; e += 2) {
      bytes |= uint64_t(e4m3_pair(scaled(e, v[e]), scaled(e + 1, v[e + 1]))) << (8 * e);
    }
    const int64_t at = int64_t(row) * w_.hidden + i * kElements;
    store_bytes<kElements, kPacked>(static_cast<std::byte*>(w_.quantised) + at, w_.hidden - int64_t(i) * kElements,
                                    bytes);
  }

  // A block of scales is two packs, of neighbouring lanes.
  __device__ __forceinline__ void write_nv_float4(int row, int i, uint4 norm, const float (&v)[kElements]) const {
    const float wanted = fused::nv_scale_wanted(warp_max(pack_amax<T>(norm), 2), scale_);
    const auto block_scale = uint8_t(e4m3_pair(wanted, 0.0f));
    if (i >= p_.packs) return;
    const float factor = fused::nv_factor(block_scale, scale_);
    uint32_t codes = 0;
#pragma unroll
    for (int e = 0; e < kElements; ++e) codes |= uint32_t(fused::to_e2m1(fused::multiply(v[e], factor))) << (4 * e);
    const int64_t at = (int64_t(row) * w_.hidden + i * kElements) / 2;
    store_bytes<4, kPacked>(static_cast<std::byte*>(w_.quantised) + at, 4, codes);
    if (i % 2 == 0)
      static_cast<uint8_t*>(w_.scales)[fused::nv_scale_offset(w_, p_.first_row + row, i / 2)] = block_scale;
  }

  // Groups of a power of two of whole packs, no more than a warp has, are the usual ones. Others' elements are looked
  // up wherever they are.
  template <typename NormOf>
  __device__ __forceinline__ void write_groups(int row, int i, uint4 norm, const float (&v)[kElements],
                                               const NormOf& norm_of) const {
    const int packs = w_.group / kElements;
    if (w_.group % kElements == 0 && packs <= 32 && (packs & (packs - 1)) == 0) {
      const float group_scale = fused::group_scale(warp_max(pack_amax<T>(norm), packs));
      if (i >= p_.packs) return;
      if (i % packs == 0) write_exponent(row, i / packs, group_scale);
      const float inverse = fused::inverse(group_scale);  // exact, of a power of two
      return write_float8(row, i, v, [&](int, float x) { return fused::multiply(x, inverse); });
    }
    if (i >= p_.packs) return;
    const uint32_t begin = uint32_t(i) * kElements, end = min(begin + kElements, uint32_t(w_.hidden));
    const uint32_t elements = uint32_t(w_.group);
    float group_scale = 1;
#pragma unroll 1
    for (uint32_t element = begin; element < end; ++element) {
      if (element == begin || element % elements == 0) {
        const uint32_t group = element / elements;
        float amax = 0;
#pragma unroll 1
        for (uint32_t of = 0; of < elements; ++of) amax = fused::amax_of(amax, norm_of(group * elements + of));
        group_scale = fused::group_scale(amax);
        write_exponent(row, group, group_scale);  // by each thread that has a part of it, alike
      }
      static_cast<uint8_t*>(w_.quantised)[int64_t(row) * w_.hidden + element] =
          uint8_t(e4m3_pair(fused::divide(norm_of(element), group_scale), 0.0f));
    }
  }
  __device__ __forceinline__ void write_exponent(int row, uint32_t group, float group_scale) const {
    static_cast<uint8_t*>(w_.scales)[fused::group_scale_offset(w_, p_.first_row + row, group)] =
        fused::exponent_of(group_scale);
  }

  const FusedParams& p_;
  const RowWork& w_;
  float scale_ = 1, factor_ = 1, row_scale_ = 1, row_inverse_ = 1;
};

}  // namespace mnnvl::kernels
