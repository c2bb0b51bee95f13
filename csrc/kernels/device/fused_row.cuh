// A row of a fused all-reduce on one block: protocol/fused_row.h with hardware's conversions, which round alike.
//
// Thread t takes packs t, t + threads, ... of the row, so it has kPartials of the row's lanes, those whose numbers
// are t modulo the threads. Its first kPartials packs stay in registers from the sum to the end; others are read back
// from residual_out, where the same thread has written them. Loops aren't unrolled, and choose among registers instead:
// with a copy of all for each pack the kernels took twelve minutes to compile.
#pragma once

#include <cuda_fp8.h>

#include "kernels/device/pack.cuh"
#include "protocol/fused_row.h"

namespace mnnvl::kernels {

template <typename T>
constexpr Dtype kDtype = sizeof(T) == 4 ? Dtype::kFloat32 : Dtype::kBFloat16;
template <>
constexpr Dtype kDtype<__half> = Dtype::kFloat16;

constexpr unsigned kWholeWarp = 0xffffffffu;

// Adds in pairs of lanes, the lowest bit first: every lane gets the sum.
template <typename Real>
__device__ __forceinline__ Real warp_sum(Real v) {
#pragma unroll
  for (int apart = 1; apart < 32; apart *= 2) v = fused::add(v, __shfl_xor_sync(kWholeWarp, v, apart));
  return v;
}
// Over groups of `lanes` neighbours, a power of two.
__device__ __forceinline__ float warp_max(float v, int lanes) {
  for (int apart = 1; apart < lanes; apart *= 2) v = fused::amax_of(v, __shfl_xor_sync(kWholeWarp, v, apart));
  return v;
}

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

// kAhead: a pack's residual is loaded before the wait for its sum, where registers allow.
template <typename T, bool kAhead>
class FusedRow {
 public:
  static constexpr int kElements = kPackElements<T>, kThreads = kFusedThreads;
  static constexpr int kLine = 128;  // bytes of a prefetch
  static constexpr int kPartials = fused::kRowLanes / kThreads;
  using Wide = fused::Wide<kDtype<T>>;
  struct Shared {
    Wide sums[2][32];  // of the warps' lanes; two rows take turns, so that one barrier a row is enough
    float most[2][32];
  };
  static_assert(kThreads % 32 == 0 && kPartials * (kThreads / 32) == 32);

  __device__ __forceinline__ FusedRow(const RowWork& work, Shared& shared)
      : w_(work), shared_(shared), packs_(int(ceil_div(work.hidden, kElements))) {
    // gamma is wanted at the end of the row: on its way meanwhile. In registers there is no room for it.
    for (int64_t at = int64_t(threadIdx.x) * kLine; at < w_.hidden * gamma_bytes(); at += int64_t(kThreads) * kLine) {
      asm volatile("prefetch.global.L2 [%0];" ::"l"(static_cast<const std::byte*>(w_.gamma) + at));
    }
  }

  __device__ __forceinline__ int packs() const { return packs_; }

  // `sum(i, pack)`: pack i of the row's sum, false if the wait for it gave up. False, for all threads of the block, if
  // one did. Every thread of the block must come, for the same rows.
  template <typename Sum>
  __device__ __forceinline__ bool finish(int64_t row, const Sum& sum) {
    row_ = row;
    Wide partial[kPartials] = {};
    bool failed = false;
    uint4 residual = kAhead ? residual_pack(int(threadIdx.x)) : uint4{};
#pragma unroll 1
    for (int n = 0, i = int(threadIdx.x); i < packs_; ++n, i += kThreads) {
      uint4 s;
      if (!sum(i, s)) failed = true;
      const uint4 r = with_residual(s, kAhead ? residual : residual_pack(i));
      if (kAhead) residual = residual_pack(i + kThreads);
      store_pack<Unit<T>>(place(w_.residual_out, i), bytes_behind(i), r);
      const Wide squares = sum_of_squares(r);
#pragma unroll
      for (int k = 0; k < kPartials; ++k) {
        if (n == k) kept_[k] = r;
        partial[k] = fused::add(partial[k], n % kPartials == k ? squares : Wide(0));
      }
    }
    if (!block_sum(partial, failed)) return false;
    inverse_ = fused::inverse_rms(sum_, w_.hidden, w_.epsilon);
    if (w_.quantization == Quantization::kDynamicFloat8) find_row_scale();
    each_norm([&](int i, uint4 norm) { write(i, norm); });
    return true;
  }

  // Scales' padding, by all threads of the grid.
  __device__ __forceinline__ void zero_padding() const {
    auto* scales = static_cast<std::byte*>(w_.scales);
    const auto zero = [&](int64_t offset, int bytes) { store_bytes<4>(scales + offset, bytes, 0); };
    fused::each_padding(w_, int64_t(blockIdx.x) * kThreads + threadIdx.x, int64_t(gridDim.x) * kThreads, zero);
  }

 private:
  __device__ __forceinline__ int64_t bytes_behind(int i) const {
    return (w_.hidden - int64_t(i) * kElements) * int64_t(sizeof(T));
  }
  __device__ __forceinline__ std::byte* place(const void* matrix, int i) const {
    return static_cast<std::byte*>(const_cast<void*>(matrix)) + (row_ * w_.hidden + int64_t(i) * kElements) * sizeof(T);
  }

  __device__ __forceinline__ uint4 residual_pack(int i) const {
    if (w_.residual == nullptr || i >= packs_) return {};
    return load_pack<Unit<T>>(place(w_.residual, i), bytes_behind(i));
  }
  __device__ __forceinline__ int gamma_bytes() const { return w_.gamma_is_float32 ? 4 : int(sizeof(T)); }

  __device__ __forceinline__ uint4 with_residual(uint4 s, uint4 residual) const {
    if (w_.residual == nullptr) return s;
    float a[kElements], b[kElements];
    Accumulator<T>::expand(s, a);
    Accumulator<T>::expand(residual, b);
#pragma unroll
    for (int e = 0; e < kElements; ++e) a[e] = fused::add(a[e], b[e]);
    return rounded(a);
  }

  // -0 stays, and can't come of a sum with s, which isn't.
  __device__ __forceinline__ static uint4 rounded(const float (&v)[kElements]) {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (sizeof(T) == 4) {
        words[i] = __float_as_uint(v[i]);
      } else {
        words[i] = round_pair<T>({v[2 * i], v[2 * i + 1]});
      }
    }
    return {words[0], words[1], words[2], words[3]};
  }

  // What is behind the row's end is zero.
  __device__ __forceinline__ static Wide sum_of_squares(uint4 r) {
    float v[kElements];
    Accumulator<T>::expand(r, v);
    Wide sum = 0;
#pragma unroll
    for (int e = 0; e < kElements; ++e) sum = fused::add(sum, fused::multiply(Wide(v[e]), Wide(v[e])));
    return sum;
  }

  // False, for all, if a thread failed.
  __device__ __forceinline__ bool block_sum(const Wide (&partial)[kPartials], bool failed) {
    constexpr int kWarps = kThreads / 32;
    const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
    Wide* sums = shared_.sums[turn_];
#pragma unroll
    for (int k = 0; k < kPartials; ++k) {
      const Wide sum = warp_sum(partial[k]);
      if (lane == 0) sums[k * kWarps + warp] = sum;
    }
    if (__syncthreads_or(failed)) return false;
    sum_ = warp_sum(sums[lane]);
    turn_ ^= 1;
    return true;
  }

  __device__ __forceinline__ float block_max(float amax) {
    const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
    float* most = shared_.most[turn_];
    amax = warp_max(amax, 32);
    if (lane == 0) most[warp] = amax;
    __syncthreads();
    return warp_max(lane < kThreads / 32 ? most[lane] : 0.0f, 32);
  }

  __device__ __forceinline__ uint4 normalised(int i, uint4 r) const {
    float v[kElements], g[kElements];
    Accumulator<T>::expand(r, v);
    const int64_t first = int64_t(i) * kElements;
    const auto* gamma = static_cast<const std::byte*>(w_.gamma) + first * gamma_bytes();
    if (gamma_bytes() == int(sizeof(T))) {
      Accumulator<T>::expand(load_pack<Unit<T>>(gamma, bytes_behind(i)), g);
    } else {
      const int64_t behind = (w_.hidden - first) * 4;
      const uint4 low = load_pack<uint32_t>(gamma, behind);
      const uint4 high = behind > kPackBytes ? load_pack<uint32_t>(gamma + kPackBytes, behind - kPackBytes) : uint4{};
      const uint32_t words[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
      for (int e = 0; e < kElements; ++e) g[e] = __uint_as_float(words[e]);
    }
    const Wide bias = w_.weight_bias;
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
      const Wide n = fused::multiply(fused::multiply(Wide(v[e]), inverse_), fused::add(bias, Wide(g[e])));
      if constexpr (sizeof(T) == 4) {
        v[e] = __uint_as_float(fused::round_signed<Dtype::kFloat32>(n));
      } else {
        v[e] = n;
      }
    }
    return rounded(v);
  }

  // Calls body(pack, norm) for the packs of this thread's warp, also for those behind the row's end, which are zero.
  template <typename Body>
  __device__ __forceinline__ void each_norm(const Body& body) {
    const int lane = int(threadIdx.x) % 32;
#pragma unroll 1
    for (int n = 0, i = int(threadIdx.x); i - lane < packs_; ++n, i += kThreads) {
      uint4 r{};
#pragma unroll
      for (int k = 0; k < kPartials; ++k) {
        if (n == k) r = kept_[k];
      }
      if (n >= kPartials && i < packs_) r = residual_out_pack(i);
      body(i, i < packs_ ? normalised(i, r) : uint4{});
    }
  }
  __device__ __forceinline__ uint4 residual_out_pack(int i) const {
    return load_pack<Unit<T>>(place(w_.residual_out, i), bytes_behind(i));
  }
  // Behind the row's end is zero, or NaN, which an amax passes over.
  __device__ __forceinline__ static float amax_of(uint4 norm) {
    float v[kElements], amax = 0;
    Accumulator<T>::expand(norm, v);
#pragma unroll
    for (int e = 0; e < kElements; ++e) amax = fused::amax_of(amax, v[e]);
    return amax;
  }

  __device__ __forceinline__ void find_row_scale() {
    float amax = 0;
    each_norm([&](int, uint4 norm) { amax = fused::amax_of(amax, amax_of(norm)); });
    row_scale_ = fused::dynamic_scale(block_max(amax));
    if (threadIdx.x == 0) static_cast<float*>(w_.scales)[row_] = row_scale_;
  }

  __device__ __forceinline__ float scale() const { return w_.scale != nullptr ? *w_.scale : w_.scale_value; }

  __device__ __forceinline__ void write(int i, uint4 norm) const {
    const bool valid = i < packs_;
    if (valid && w_.norm != nullptr) store_pack<Unit<T>>(place(w_.norm, i), bytes_behind(i), norm);
    if (w_.quantization == Quantization::kNone) return;
    float v[kElements];
    Accumulator<T>::expand(norm, v);
    switch (w_.quantization) {
      case Quantization::kNone: return;
      case Quantization::kFloat8: {
        const float factor = fused::divide(1.0f, scale());
        return write_float8(i, v, [&](int, float x) { return fused::multiply(x, factor); });
      }
      case Quantization::kDynamicFloat8:
        return write_float8(i, v, [&](int, float x) { return fused::divide(x, row_scale_); });
      case Quantization::kGroupFloat8: return write_groups(i, norm, v);
      case Quantization::kNVFloat4:
        if constexpr (sizeof(T) == 2) write_nv_float4(i, norm, v);
        return;
    }
  }

  template <typename Scaled>
  __device__ __forceinline__ void write_float8(int i, const float (&v)[kElements], const Scaled& scaled) const {
    if (i >= packs_) return;
    uint64_t bytes = 0;
#pragma unroll
    for (int e = 0; e < kElements; e += 2) {
      bytes |= uint64_t(e4m3_pair(scaled(e, v[e]), scaled(e + 1, v[e + 1]))) << (8 * e);
    }
    const int64_t at = row_ * w_.hidden + int64_t(i) * kElements;
    store_bytes<kElements>(static_cast<std::byte*>(w_.quantised) + at, w_.hidden - int64_t(i) * kElements, bytes);
  }

  // A block of scales is two packs, of neighbouring lanes.
  __device__ __forceinline__ void write_nv_float4(int i, uint4 norm, const float (&v)[kElements]) const {
    const float global = scale();
    const uint8_t block_scale = fused::nv_scale(warp_max(amax_of(norm), 2), global);
    if (i >= packs_) return;
    const float factor = fused::nv_factor(block_scale, global);
    uint32_t codes = 0;
#pragma unroll
    for (int e = 0; e < kElements; ++e) codes |= uint32_t(fused::to_e2m1(fused::multiply(v[e], factor))) << (4 * e);
    const int64_t at = (row_ * w_.hidden + int64_t(i) * kElements) / 2;
    store_bytes<4>(static_cast<std::byte*>(w_.quantised) + at, 4, codes);
    if (i % 2 == 0) static_cast<uint8_t*>(w_.scales)[fused::nv_scale_offset(w_, row_, i / 2)] = block_scale;
  }

  // Groups of a power of two of whole packs, no more than a warp has, are the usual ones. Others' elements are looked
  // up wherever they are.
  __device__ __forceinline__ void write_groups(int i, uint4 norm, const float (&v)[kElements]) const {
    const int packs = w_.group / kElements;
    if (w_.group % kElements == 0 && packs <= 32 && (packs & (packs - 1)) == 0) {
      const float group_scale = fused::group_scale(warp_max(amax_of(norm), packs));
      if (i >= packs_) return;
      if (i % packs == 0) write_exponent(i / packs, group_scale);
      return write_float8(i, v, [&](int, float x) { return fused::divide(x, group_scale); });
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
        write_exponent(group, group_scale);  // by each thread that has a part of it, alike
      }
      static_cast<uint8_t*>(w_.quantised)[row_ * w_.hidden + element] =
          uint8_t(e4m3_pair(fused::divide(norm_of(element), group_scale), 0.0f));
    }
  }
  __device__ __forceinline__ void write_exponent(int64_t group, float group_scale) const {
    static_cast<uint8_t*>(w_.scales)[fused::group_scale_offset(w_, row_, group)] = fused::exponent_of(group_scale);
  }
  // Of any element of the row, once the block has passed block_sum().
  __device__ __forceinline__ float norm_of(int64_t element) const {
    const auto r = static_cast<const fused::Stored<kDtype<T>>*>(w_.residual_out)[row_ * w_.hidden + element];
    const float gamma = w_.gamma_is_float32
                            ? static_cast<const float*>(w_.gamma)[element]
                            : fused::widen<kDtype<T>>(static_cast<const fused::Stored<kDtype<T>>*>(w_.gamma)[element]);
    return fused::widen<kDtype<T>>(fused::normalise<kDtype<T>>(r, inverse_, gamma, w_.weight_bias));
  }

  const RowWork& w_;
  Shared& shared_;
  const int packs_;
  uint4 kept_[kPartials];  // of residual_out
  int64_t row_ = 0;
  int turn_ = 0;
  Wide sum_ = 0, inverse_ = 0;
  float row_scale_ = 1;
};

}  // namespace mnnvl::kernels
