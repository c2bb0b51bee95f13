// AVX-512 (F, BW, VL, DQ). vcvtneps2bf16 is not used: it flushes subnormals.
#if defined(__x86_64__)

#include <immintrin.h>

#include "cpu/reduce.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,f16c")
// gcc 12's own headers define "undefined" vectors as `__Y = __Y`.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include "cpu/reduce_loop.h"

namespace {

struct Sum512 {
  using Float = __m512;
  static constexpr int kLanes = 16;
  static constexpr int kBatch = 4;
  static MNNVL_INLINE Float zero() { return _mm512_setzero_ps(); }
  static MNNVL_INLINE Float add(Float a, Float b) { return _mm512_add_ps(a, b); }
  static MNNVL_INLINE Float divide(Float a, float b) { return _mm512_div_ps(a, _mm512_set1_ps(b)); }
  static MNNVL_INLINE __mmask16 is_nan(Float v) { return _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q); }
};

struct F32 : Sum512 {
  static constexpr int kElementBytes = 4;
  static MNNVL_INLINE Float load(const std::byte* p) { return _mm512_loadu_ps(p); }
  static MNNVL_INLINE void store(std::byte* p, Float v) {
    const Float canonical = _mm512_castsi512_ps(_mm512_set1_epi32(0x7fffffff));
    v = _mm512_add_ps(v, zero());  // a quotient can be -0
    _mm512_storeu_ps(p, _mm512_mask_mov_ps(v, is_nan(v), canonical));
  }
};

// The last steps of both 16-bit types: -0 -> +0, NaN -> 0x7fff.
MNNVL_INLINE void store_halves(std::byte* p, __m256i halves, __mmask16 nan) {
  const __mmask16 keep = _mm256_cmpneq_epi16_mask(halves, _mm256_set1_epi16(static_cast<short>(0x8000)));
  halves = _mm256_maskz_mov_epi16(keep, halves);
  halves = _mm256_mask_mov_epi16(halves, nan, _mm256_set1_epi16(0x7fff));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), halves);
}

struct F16 : Sum512 {
  static constexpr int kElementBytes = 2;
  static MNNVL_INLINE Float load(const std::byte* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static MNNVL_INLINE void store(std::byte* p, Float v) {
    store_halves(p, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), is_nan(v));
  }
};

struct BF16 : Sum512 {
  static constexpr int kElementBytes = 2;
  static MNNVL_INLINE Float load(const std::byte* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
  }
  static MNNVL_INLINE void store(std::byte* p, Float v) {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    store_halves(p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)), is_nan(v));
  }
};

}  // namespace

namespace mnnvl::cpu::detail {
const ReduceFunction kReduceAvx512[3][2] = MNNVL_REDUCE_TABLE(F32, F16, BF16);
}

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif  // x86-64
