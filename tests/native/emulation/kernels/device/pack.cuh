// In place of csrc/kernels/device/pack.cuh, for kernels on pair channels.
#pragma once

#include "native/emulation/cuda.h"
#include "protocol/arithmetic.h"
#include "protocol/workspace.h"

struct __half {};
struct __nv_bfloat16 {};

namespace mnnvl::kernels {

template <typename T>
constexpr Dtype kDtypeOf = Dtype::kFloat32;
template <>
constexpr Dtype kDtypeOf<__half> = Dtype::kFloat16;
template <>
constexpr Dtype kDtypeOf<__nv_bfloat16> = Dtype::kBFloat16;

template <typename T>
uint4 without_negative_zero(uint4 pack) {
  return pack;  // what is added to makes no difference
}

template <typename T>
struct Accumulator {
  using E = arithmetic::Element<kDtypeOf<T>>;
  using Stored = typename E::Stored;
  static constexpr int kCount = kPackBytes / int(sizeof(Stored));
  float sum[kCount];

  static float value(const uint4& pack, int i) { return E::widen(reinterpret_cast<const Stored*>(&pack)[i]); }
  void begin(uint4 pack) {
    for (int i = 0; i < kCount; ++i) sum[i] = value(pack, i);
  }
  void add(uint4 pack) {
    for (int i = 0; i < kCount; ++i) sum[i] = sum[i] + value(pack, i);
  }
  uint4 finish(float divisor) const {
    uint4 pack;
    for (int i = 0; i < kCount; ++i) reinterpret_cast<Stored*>(&pack)[i] = E::narrow(sum[i] / divisor);
    return pack;
  }
};

inline bool is_vector_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % kPackBytes == 0; }
}  // namespace mnnvl::kernels
