// The loop of float sums, shared by the instruction sets. Included once by each reduce_<isa>.cpp, after its target
// pragma, so that it is compiled for that target; everything has internal linkage, or the linker might pick another
// target's copy.
//
// A vector policy V has: kLanes, kElementBytes, Float (the accumulator), and static zero(), add(a, b), divide(a,
// float), load(const std::byte*) -> Float, any alignment, store(std::byte*, Float), which rounds, turns -0 into +0 and
// NaN into the canonical one.
#pragma once

#include <cstddef>
#include <cstdint>

#define MNNVL_INLINE inline __attribute__((always_inline))

namespace {

// `kBatch` vectors at once: their sums are independent, which hides the latency of the adds and of the loads.
template <class V, bool kAvg, int kBatch>
MNNVL_INLINE void reduce_batch(const std::byte* const* sources, int count, std::byte* out, std::byte* second,
                               int64_t offset) {
  constexpr int64_t kBytes = V::kLanes * V::kElementBytes;
  typename V::Float sum[kBatch];
#pragma GCC unroll 8
  for (int k = 0; k < kBatch; ++k) sum[k] = V::add(V::zero(), V::load(sources[0] + offset + k * kBytes));  // -0 -> +0
  for (int r = 1; r < count; ++r) {
    const std::byte* source = sources[r] + offset;
#pragma GCC unroll 8
    for (int k = 0; k < kBatch; ++k) sum[k] = V::add(sum[k], V::load(source + k * kBytes));
  }
#pragma GCC unroll 8
  for (int k = 0; k < kBatch; ++k) {
    if (kAvg) sum[k] = V::divide(sum[k], static_cast<float>(count));
    V::store(out + offset + k * kBytes, sum[k]);
    if (second != nullptr) V::store(second + offset + k * kBytes, sum[k]);
  }
}

// The last elements, fewer than a vector, through zero-padded copies.
template <class V, bool kAvg>
MNNVL_INLINE void reduce_tail(const std::byte* const* sources, int count, std::byte* out, std::byte* second,
                              int64_t offset, int64_t bytes) {
  constexpr int64_t kBytes = V::kLanes * V::kElementBytes;
  std::byte pack[kBytes] = {};
  typename V::Float sum = V::zero();
  for (int r = 0; r < count; ++r) {
    __builtin_memcpy(pack, sources[r] + offset, bytes);
    sum = V::add(sum, V::load(pack));
  }
  if (kAvg) sum = V::divide(sum, static_cast<float>(count));
  V::store(pack, sum);
  __builtin_memcpy(out + offset, pack, bytes);
  if (second != nullptr) __builtin_memcpy(second + offset, pack, bytes);
}

template <class V, bool kAvg>
void reduce(const std::byte* const* sources, int count, std::byte* out, std::byte* second, int64_t numel) {
  constexpr int64_t kBytes = V::kLanes * V::kElementBytes;
  constexpr int kBatch = V::kBatch;
  const int64_t bytes = numel * V::kElementBytes;
  int64_t offset = 0;
  for (; offset + kBatch * kBytes <= bytes; offset += kBatch * kBytes) {
    reduce_batch<V, kAvg, kBatch>(sources, count, out, second, offset);
  }
  for (; offset + kBytes <= bytes; offset += kBytes) {
    reduce_batch<V, kAvg, 1>(sources, count, out, second, offset);
  }
  if (offset < bytes) reduce_tail<V, kAvg>(sources, count, out, second, offset, bytes - offset);
}

}  // namespace

#define MNNVL_REDUCE_TABLE(F32, F16, BF16) \
  { \
    {reduce<F32, false>, reduce<F32, true>}, {reduce<F16, false>, reduce<F16, true>}, { \
      reduce<BF16, false>, reduce<BF16, true> \
    } \
  }
