// AVX2 and F16C.
#if defined(__x86_64__)

#include <immintrin.h>

#include "cpu/reduce.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,f16c")
#endif

#include "cpu/reduce_loop.h"

namespace {

struct Sum256 {
  using Float = __m256;
  static constexpr int kLanes = 8;
  static constexpr int kBatch = 4;
  static MNNVL_INLINE Float zero() { return _mm256_setzero_ps(); }
  static MNNVL_INLINE Float add(Float a, Float b) { return _mm256_add_ps(a, b); }
  static MNNVL_INLINE Float divide(Float a, float b) { return _mm256_div_ps(a, _mm256_set1_ps(b)); }
  static MNNVL_INLINE Float is_nan(Float v) { return _mm256_cmp_ps(v, v, _CMP_UNORD_Q); }
};

struct F32 : Sum256 {
  static constexpr int kElementBytes = 4;
  static MNNVL_INLINE Float load(const std::byte* p) { return _mm256_loadu_ps(reinterpret_cast<const float*>(p)); }
  static MNNVL_INLINE void store(std::byte* p, Float v) {
    const Float canonical = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    v = _mm256_add_ps(v, zero());  // a quotient can be -0
    _mm256_storeu_ps(reinterpret_cast<float*>(p), _mm256_blendv_ps(v, canonical, is_nan(v)));
  }
};

// The last steps of both 16-bit types: -0 -> +0, NaN -> 0x7fff.
MNNVL_INLINE void store_halves(std::byte* p, __m128i halves, __m256 nan) {
  const __m256i wide = _mm256_castps_si256(nan);
  const __m128i nan16 = _mm_packs_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
  const __m128i negative_zero = _mm_cmpeq_epi16(halves, _mm_set1_epi16(static_cast<short>(0x8000)));
  halves = _mm_andnot_si128(negative_zero, halves);
  halves = _mm_blendv_epi8(halves, _mm_set1_epi16(0x7fff), nan16);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), halves);
}

struct F16 : Sum256 {
  static constexpr int kElementBytes = 2;
  static MNNVL_INLINE Float load(const std::byte* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static MNNVL_INLINE void store(std::byte* p, Float v) {
    store_halves(p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), is_nan(v));
  }
};

struct BF16 : Sum256 {
  static constexpr int kElementBytes = 2;
  static MNNVL_INLINE Float load(const std::byte* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
  }
  static MNNVL_INLINE void store(std::byte* p, Float v) {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i narrow = _mm256_srli_epi32(rounded, 16);
    const __m128i halves = _mm_packus_epi32(_mm256_castsi256_si128(narrow), _mm256_extracti128_si256(narrow, 1));
    store_halves(p, halves, is_nan(v));
  }
};

}  // namespace

namespace mnnvl::cpu::detail {
const ReduceFunction kReduceAvx2[3][2] = MNNVL_REDUCE_TABLE(F32, F16, BF16);
}

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif  // x86-64
