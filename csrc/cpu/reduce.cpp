// The portable reduction, and the choice among instruction sets.
#include "cpu/reduce.h"

#include "cpu/reduce_loop.h"

namespace {

MNNVL_INLINE uint32_t bits_of(float v) {
  uint32_t bits;
  __builtin_memcpy(&bits, &v, 4);
  return bits;
}

MNNVL_INLINE float float_of(uint32_t bits) {
  float v;
  __builtin_memcpy(&v, &bits, 4);
  return v;
}

struct Sum1 {
  using Float = float;
  static constexpr int kLanes = 1;
  static constexpr int kBatch = 8;
  static MNNVL_INLINE Float zero() { return 0.0f; }
  static MNNVL_INLINE Float add(Float a, Float b) { return a + b; }
  static MNNVL_INLINE Float divide(Float a, float b) { return a / b; }
};

struct F32 : Sum1 {
  static constexpr int kElementBytes = 4;
  static MNNVL_INLINE Float load(const std::byte* p) {
    float v;
    __builtin_memcpy(&v, p, 4);
    return v;
  }
  static MNNVL_INLINE void store(std::byte* p, Float v) {
    const uint32_t bits = v != v ? 0x7fffffffu : bits_of(v + 0.0f);  // a quotient can be -0
    __builtin_memcpy(p, &bits, 4);
  }
};

// The last steps of both 16-bit types: -0 -> +0, NaN -> 0x7fff.
MNNVL_INLINE void store_half(std::byte* p, uint32_t half, bool nan) {
  const uint16_t bits = static_cast<uint16_t>(nan ? 0x7fffu : half == 0x8000u ? 0u : half);
  __builtin_memcpy(p, &bits, 2);
}

MNNVL_INLINE uint32_t load_half(const std::byte* p) {
  uint16_t half;
  __builtin_memcpy(&half, p, 2);
  return half;
}

struct F16 : Sum1 {
  static constexpr int kElementBytes = 2;
  static MNNVL_INLINE Float load(const std::byte* p) {
    const uint32_t half = load_half(p);
    const uint32_t sign = (half & 0x8000u) << 16;
    const uint32_t exponent = (half >> 10) & 0x1f;
    const uint32_t mantissa = half & 0x3ffu;
    if (exponent == 31) return float_of(sign | 0x7f800000u | mantissa << 13);
    if (exponent != 0) return float_of(sign | (exponent + 112) << 23 | mantissa << 13);
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;  // zero or subnormal: exact
    return float_of(sign | bits_of(magnitude));
  }
  static MNNVL_INLINE void store(std::byte* p, Float v) {
    const uint32_t bits = bits_of(v);
    const uint32_t sign = (bits >> 16) & 0x8000u;
    const uint32_t magnitude = bits & 0x7fffffffu;
    uint32_t half;
    if (magnitude >= 0x47800000u) {  // 2^16 and more
      half = 0x7c00;
    } else if (magnitude >= 0x38800000u) {  // normal: round the 13 dropped bits; a carry may reach infinity
      half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1)) >> 13;
    } else {  // subnormal: adding 0.5 puts the unit of 2^-24 at the sum's last bit, and the addition rounds
      half = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
    }
    store_half(p, sign | half, v != v);
  }
};

struct BF16 : Sum1 {
  static constexpr int kElementBytes = 2;
  static MNNVL_INLINE Float load(const std::byte* p) { return float_of(load_half(p) << 16); }
  static MNNVL_INLINE void store(std::byte* p, Float v) {
    const uint32_t bits = bits_of(v);
    store_half(p, (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16, v != v);
  }
};

}  // namespace

namespace mnnvl::cpu {

namespace detail {
const ReduceFunction kReducePortable[3][2] = MNNVL_REDUCE_TABLE(F32, F16, BF16);
}

ReduceFunction reduce_function(Isa isa, Dtype dtype, ReduceOp op) {
  const int d = static_cast<int>(dtype);
  const int o = static_cast<int>(op);
  switch (isa) {
    case Isa::kPortable: return detail::kReducePortable[d][o];
#if defined(__x86_64__)
    case Isa::kAvx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c") ? detail::kReduceAvx2[d][o] : nullptr;
    case Isa::kAvx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                     __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                     __builtin_cpu_supports("f16c")
                 ? detail::kReduceAvx512[d][o]
                 : nullptr;
#elif defined(__aarch64__)
    case Isa::kNeon: return detail::kReduceNeon[d][o];
#endif
    default: return nullptr;
  }
}

ReduceFunction reduce_function(Dtype dtype, ReduceOp op) {
  for (int isa = kIsaCount - 1; isa > 0; --isa) {
    if (ReduceFunction function = reduce_function(static_cast<Isa>(isa), dtype, op)) return function;
  }
  return reduce_function(Isa::kPortable, dtype, op);
}

const char* name(Isa isa) {
  switch (isa) {
    case Isa::kPortable: return "portable";
    case Isa::kNeon: return "neon";
    case Isa::kAvx2: return "avx2";
    case Isa::kAvx512: return "avx512";
  }
  return "?";
}

}  // namespace mnnvl::cpu
