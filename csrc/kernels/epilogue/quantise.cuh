// What is written of a normalised row beside the norm itself: its quantisations, a pack at a time, by the thread that
// has it. csrc/protocol/fused_row.h says what they are.
#pragma once

#include <cuda_fp8.h>

#include "kernels/device/cluster.cuh"
#include "kernels/device/pack.cuh"
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

// The first `valid` of kBytes bytes.
template <int kBytes>
__device__ __forceinline__ void store_bytes(std::byte* p, int64_t valid, uint64_t bytes) {
  if (valid >= kBytes && reinterpret_cast<uintptr_t>(p) % kBytes == 0) {
    if constexpr (kBytes == 8) *reinterpret_cast<uint64_t*>(p) = bytes;
    if constexpr (kBytes == 4) *reinterpret_cast<uint32_t*>(p) = uint32_t(bytes);
    return;
  }
#pragma unroll
  for (int i = 0; i < kBytes; ++i) {
    if (i < valid) p[i] = std::byte(bytes >> (8 * i) & 0xff);
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

template <typename T>
class RowQuantiser {
 public:
  static constexpr int kElements = kPackElements<T>;

  __device__ __forceinline__ RowQuantiser(const RowWork& work, int packs) : w_(work), packs_(packs) {}

  // What all rows want.
  __device__ __forceinline__ void prepare() { scale_ = w_.scale != nullptr ? *w_.scale : w_.scale_value; }

  // Of dynamic FP8, before write(): the row's scale.
  __device__ __forceinline__ float take_row_amax(float amax) {
    row_scale_ = fused::dynamic_scale(amax);
    row_inverse_ = fused::divide(1.0f, row_scale_);
    return row_scale_;
  }

  // By all threads of a warp, for neighbouring packs; those behind the row's end are zero. `norm_of(element)`: of any
  // element of the row.
  template <typename NormOf>
  __device__ __forceinline__ void write(int64_t row, int i, uint4 norm, const NormOf& norm_of) const {
    float v[kElements];
    Accumulator<T>::expand(norm, v);
    switch (w_.quantization) {
      case Quantization::kNone: return;
      case Quantization::kFloat8: {
        const float factor = fused::divide(1.0f, scale_);
        return write_float8(row, i, v, [&](int, float x) { return fused::multiply(x, factor); });
      }
      case Quantization::kDynamicFloat8: return write_float8(row, i, v, [&](int, float x) { return by_row_scale(x); });
      case Quantization::kGroupFloat8: return write_groups(row, i, norm, v, norm_of);
      case Quantization::kNVFloat4:
        if constexpr (sizeof(T) == 2) write_nv_float4(row, i, norm, v);
        return;
    }
  }

 private:
  // x / row_scale_, rounded to nearest: from a correctly rounded inverse, one step of Newton's makes a quotient that is
  // at most a unit off, and the next the right one (Markstein). Where the remainder may be too small for float32, e4m3
  // of the quotient is 0 either way.
  __device__ __forceinline__ float by_row_scale(float x) const {
    if (x == 0) return x;  // with its sign
    if (row_inverse_ == 0) return fused::multiply(x, 0.0f);  // the scale is infinite
    float quotient = fused::multiply(x, row_inverse_);
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      quotient = __fmaf_rn(__fmaf_rn(-quotient, row_scale_, x), row_inverse_, quotient);
    }
    return quotient;
  }

  template <typename Scaled>
  __device__ __forceinline__ void write_float8(int64_t row, int i, const float (&v)[kElements],
                                               const Scaled& scaled) const {
    if (i >= packs_) return;
    uint64_t bytes = 0;
#pragma unroll
    for (int e = 0; e < kElements; e += 2) {
      bytes |= uint64_t(e4m3_pair(scaled(e, v[e]), scaled(e + 1, v[e + 1]))) << (8 * e);
    }
    const int64_t at = row * w_.hidden + int64_t(i) * kElements;
    store_bytes<kElements>(static_cast<std::byte*>(w_.quantised) + at, w_.hidden - int64_t(i) * kElements, bytes);
  }

  // A block of scales is two packs, of neighbouring lanes.
  __device__ __forceinline__ void write_nv_float4(int64_t row, int i, uint4 norm, const float (&v)[kElements]) const {
    const uint8_t block_scale = fused::nv_scale(warp_max(pack_amax<T>(norm), 2), scale_);
    if (i >= packs_) return;
    const float factor = fused::nv_factor(block_scale, scale_);
    uint32_t codes = 0;
#pragma unroll
    for (int e = 0; e < kElements; ++e) codes |= uint32_t(fused::to_e2m1(fused::multiply(v[e], factor))) << (4 * e);
    const int64_t at = (row * w_.hidden + int64_t(i) * kElements) / 2;
    store_bytes<4>(static_cast<std::byte*>(w_.quantised) + at, 4, codes);
    if (i % 2 == 0) static_cast<uint8_t*>(w_.scales)[fused::nv_scale_offset(w_, row, i / 2)] = block_scale;
  }

  // Groups of a power of two of whole packs, no more than a warp has, are the usual ones. Others' elements are looked
  // up wherever they are.
  template <typename NormOf>
  __device__ __forceinline__ void write_groups(int64_t row, int i, uint4 norm, const float (&v)[kElements],
                                               const NormOf& norm_of) const {
    const int packs = w_.group / kElements;
    if (w_.group % kElements == 0 && packs <= 32 && (packs & (packs - 1)) == 0) {
      const float group_scale = fused::group_scale(warp_max(pack_amax<T>(norm), packs));
      if (i >= packs_) return;
      if (i % packs == 0) write_exponent(row, i / packs, group_scale);
      const float inverse = fused::divide(1.0f, group_scale);  // exact, of a power of two
      return write_float8(row, i, v, [&](int, float x) { return fused::multiply(x, inverse); });
    }
    if (i >= packs_) return;
    const int64_t begin = int64_t(i) * kElements, end = min64(begin + kElements, w_.hidden);
    float group_scale = 1;
#pragma unroll 1
    for (int64_t element = begin; element < end; ++element) {
      if (element == begin || element % w_.group == 0) {
        const int64_t group = element / w_.group;
        float amax = 0;
#pragma unroll 1
        for (int of = 0; of < w_.group; ++of) amax = fused::amax_of(amax, norm_of(group * w_.group + of));
        group_scale = fused::group_scale(amax);
        write_exponent(row, group, group_scale);  // by each thread that has a part of it, alike
      }
      static_cast<uint8_t*>(w_.quantised)[row * w_.hidden + element] =
          uint8_t(e4m3_pair(fused::divide(norm_of(element), group_scale), 0.0f));
    }
  }
  __device__ __forceinline__ void write_exponent(int64_t row, int64_t group, float group_scale) const {
    static_cast<uint8_t*>(w_.scales)[fused::group_scale_offset(w_, row, group)] = fused::exponent_of(group_scale);
  }

  const RowWork& w_;
  const int packs_;
  float scale_ = 1, row_scale_ = 1, row_inverse_ = 1;
};

}  // namespace mnnvl::kernels
