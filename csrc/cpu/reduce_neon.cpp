// AArch64's baseline vectors (Grace, and any other Arm server).
#if defined(__aarch64__)

#include <arm_neon.h>

#include "cpu/reduce.h"
#include "cpu/reduce_loop.h"

namespace {

struct Sum128 {
  using Float = float32x4_t;
  static constexpr int kLanes = 4;
  static constexpr int kBatch = 8;
  static MNNVL_INLINE Float zero() { return vdupq_n_f32(0.0f); }
  static MNNVL_INLINE Float add(Float a, Float b) { return vaddq_f32(a, b); }
  static MNNVL_INLINE Float divide(Float a, float b) { return vdivq_f32(a, vdupq_n_f32(b)); }
  static MNNVL_INLINE uint32x4_t is_number(Float v) { return vceqq_f32(v, v); }
};

struct F32 : Sum128 {
  static constexpr int kElementBytes = 4;
  static MNNVL_INLINE Float load(const std::byte* p) {
    return vreinterpretq_f32_u8(vld1q_u8(reinterpret_cast<const uint8_t*>(p)));
  }
  static MNNVL_INLINE void store(std::byte* p, Float v) {
    v = vaddq_f32(v, zero());  // a quotient can be -0
    const uint32x4_t bits = vbslq_u32(is_number(v), vreinterpretq_u32_f32(v), vdupq_n_u32(0x7fffffff));
    vst1q_u8(reinterpret_cast<uint8_t*>(p), vreinterpretq_u8_u32(bits));
  }
};

// The last steps of both 16-bit types: -0 -> +0, NaN -> 0x7fff.
MNNVL_INLINE void store_halves(std::byte* p, uint16x4_t halves, uint32x4_t number) {
  halves = vbic_u16(halves, vceq_u16(halves, vdup_n_u16(0x8000)));
  halves = vbsl_u16(vmovn_u32(number), halves, vdup_n_u16(0x7fff));
  vst1_u8(reinterpret_cast<uint8_t*>(p), vreinterpret_u8_u16(halves));
}

struct F16 : Sum128 {
  static constexpr int kElementBytes = 2;
  static MNNVL_INLINE Float load(const std::byte* p) {
    return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(reinterpret_cast<const uint8_t*>(p))));
  }
  static MNNVL_INLINE void store(std::byte* p, Float v) {
    store_halves(p, vreinterpret_u16_f16(vcvt_f16_f32(v)), is_number(v));
  }
};

struct BF16 : Sum128 {
  static constexpr int kElementBytes = 2;
  static MNNVL_INLINE Float load(const std::byte* p) {
    const uint16x4_t halves = vreinterpret_u16_u8(vld1_u8(reinterpret_cast<const uint8_t*>(p)));
    return vreinterpretq_f32_u32(vshll_n_u16(halves, 16));
  }
  static MNNVL_INLINE void store(std::byte* p, Float v) {
    const uint32x4_t bits = vreinterpretq_u32_f32(v);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t rounded = vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7fff)), odd);
    store_halves(p, vshrn_n_u32(rounded, 16), is_number(v));
  }
};

}  // namespace

namespace mnnvl::cpu::detail {
const ReduceFunction kReduceNeon[3][2] = MNNVL_REDUCE_TABLE(F32, F16, BF16);
}

#endif  // AArch64
