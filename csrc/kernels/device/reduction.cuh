// The same bytes of every rank, reduced in rank order: what each thread does of a piece. The arithmetic is that of
// protocol/arithmetic.h.
#pragma once

#include <type_traits>

#include "kernels/device/channel.cuh"
#include "protocol/arithmetic.h"

namespace mnnvl::kernels {

// An operation that is known when the kernel is compiled: the sums that models are trained with. `divisor`: of AVG.
template <ReduceOp op>
struct Fixed {
  int divisor;
  template <typename Wide>
  __device__ __forceinline__ Wide combine(Wide a, Wide b) const {
    return arithmetic::combine<op>(a, b);
  }
};
// Any other: slower, and a tenth of the code.
struct Any {
  int divisor;
  ReduceOp op;
  template <typename Wide>
  __device__ __forceinline__ Wide combine(Wide a, Wide b) const {
    if (op == ReduceOp::kSum) return arithmetic::combine<ReduceOp::kSum>(a, b);
    if (op == ReduceOp::kProduct) return arithmetic::combine<ReduceOp::kProduct>(a, b);
    if (op == ReduceOp::kMin) return arithmetic::combine<ReduceOp::kMin>(a, b);
    if (op == ReduceOp::kMax) return arithmetic::combine<ReduceOp::kMax>(a, b);
    if constexpr (std::is_integral<Wide>::value) {
      if (op == ReduceOp::kBand) return a & b;
      if (op == ReduceOp::kBor) return a | b;
      if (op == ReduceOp::kBxor) return a ^ b;
    }
    return a;
  }
};

// Where the ranks' bytes are. Lines are this rank's of a line ring; the own bytes, and slots, are as they are.
struct Sources {
  const std::byte* at[kMaxWorldSize];
  uint64_t flags[kMaxWorldSize];  // of lines
};

// Two of the types of 16 bits are rounded in one instruction. The same bits as arithmetic::Element's.
template <Dtype dtype>
constexpr bool kInPairs = dtype == Dtype::kFloat16 || dtype == Dtype::kBFloat16;
template <Dtype dtype>
__device__ __forceinline__ uint32_t narrow_pair(float low, float high) {
#ifdef __CUDA_ARCH__
  using T = std::conditional_t<dtype == Dtype::kFloat16, __half, __nv_bfloat16>;
  return without_negative_zero<T>(round_pair<T>({low, high}));
#else
  using E = arithmetic::Element<dtype>;
  return E::narrow(low) | uint32_t(E::narrow(high)) << 16;
#endif
}

// Values of `Unit` many bytes, kept wide.
template <Dtype dtype, typename Unit>
struct Values {
  using E = arithmetic::Element<dtype>;
  using Stored = typename E::Stored;
  static constexpr int kBits = 8 * int(sizeof(Stored)), kCount = int(sizeof(Unit) / sizeof(Stored));
  typename E::Wide v[kCount];

  // `first`: of the ranks.
  template <typename Op>
  __device__ __forceinline__ void add(Unit unit, bool first, const Op& op) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const auto value = E::widen(Stored(unit >> (kBits * i)));
      v[i] = first ? value : op.combine(v[i], value);
    }
  }
  // Of AVG. Apart from finish(), so that a sum has one branch around all divisions instead of one around each.
  __device__ __forceinline__ void divide(int divisor) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) v[i] = arithmetic::finish<ReduceOp::kAvg>(v[i], divisor);
  }
  __device__ __forceinline__ void scale(typename E::Wide factor) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) v[i] *= factor;
  }
  __device__ __forceinline__ Unit finish() const {
    using Bits = std::make_unsigned_t<Stored>;
    Unit unit = 0;
    if constexpr (kInPairs<dtype> && kCount > 1) {
#pragma unroll
      for (int i = 0; i < kCount; i += 2) unit |= Unit(narrow_pair<dtype>(v[i], v[i + 1])) << (kBits * i);
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) unit |= Unit(Unit(Bits(E::narrow(v[i]))) << (kBits * i));
    }
    return unit;
  }
};

template <int kCount, typename V>
__device__ __forceinline__ void divide_all(V (&values)[kCount], int divisor) {
  if (divisor == 1) return;
#pragma unroll
  for (int i = 0; i < kCount; ++i) values[i].divide(divisor);
}

// One access to memory as words of Values.
template <typename Unit>
struct Access {
  static constexpr int kWords = 1;
  Unit words[1];
};
template <>
struct alignas(16) Access<uint4> {
  static constexpr int kWords = 2;
  uint64_t words[2];
};

// All units in [begin, end) of the ranks' bytes, from and to addresses that allow such accesses. Several loads of each
// of two ranks are in flight at a time; those of a thread lie a warp apart, a distance that the compiler knows.
template <Dtype dtype, typename Unit, int kInFlight, typename Op>
__device__ __forceinline__ void reduce_units(const Sources& sources, int world, std::byte* out, int begin, int end,
                                             const Op& op, int thread, int threads) {
  using A = Access<Unit>;
  constexpr int kSize = int(sizeof(Unit)), kStride = kWarp * kSize;
  const int place = thread / kWarp * kInFlight * kStride + thread % kWarp * kSize;
  for (int first = begin + place; first < end; first += kInFlight * threads * kSize) {
    Values<dtype, std::decay_t<decltype(A::words[0])>> values[kInFlight][A::kWords];
    for (int r = 0; r < world; r += 2) {
      A loaded[2][kInFlight];
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        if (r + s == world) break;
        const std::byte* source = sources.at[r + s] + first;
#pragma unroll
        for (int k = 0; k < kInFlight; ++k) {
          if (first + k * kStride < end) loaded[s][k] = *reinterpret_cast<const A*>(source + k * kStride);
        }
      }
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        if (r + s == world) break;
#pragma unroll
        for (int k = 0; k < kInFlight; ++k) {
#pragma unroll
          for (int w = 0; w < A::kWords; ++w) values[k][w].add(loaded[s][k].words[w], r + s == 0, op);
        }
      }
    }
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      if (first + k * kStride >= end) continue;
      divide_all(values[k], op.divisor);
      A done;
#pragma unroll
      for (int w = 0; w < A::kWords; ++w) done.words[w] = values[k][w].finish();
      *reinterpret_cast<A*>(out + first + k * kStride) = done;
    }
  }
}

// The same of float sums of two ranks, where no sum has to be kept while others are loaded: all packs that a thread has
// of a piece are in flight at a time. Code for each number of them: around conditions registers are short.
constexpr int kRow = (kMaxExchangeThreads - kWarp) * kPackBytes;  // a pack of each data thread
template <Dtype dtype, int kMost, typename Op>
__device__ __forceinline__ void reduce_row(const std::byte* a, const std::byte* b, std::byte* out, int count,
                                           const Op& op, float factor) {
  if constexpr (kMost > 1) {
    if (count < kMost) return reduce_row<dtype, kMost - 1>(a, b, out, count, op, factor);
  }
  using A = Access<uint4>;
  A loaded[2][kMost];
#pragma unroll
  for (int k = 0; k < kMost; ++k) loaded[0][k] = *reinterpret_cast<const A*>(a + k * kRow);
#pragma unroll
  for (int k = 0; k < kMost; ++k) loaded[1][k] = *reinterpret_cast<const A*>(b + k * kRow);
#pragma unroll
  for (int k = 0; k < kMost; ++k) {
    A done;
#pragma unroll
    for (int w = 0; w < A::kWords; ++w) {
      Values<dtype, uint64_t> values;
      values.add(loaded[0][k].words[w], /*first=*/true, op);
      values.add(loaded[1][k].words[w], /*first=*/false, op);
      values.scale(factor);
      done.words[w] = values.finish();
    }
    *reinterpret_cast<A*>(out + k * kRow) = done;
  }
}

template <Dtype dtype, int kInFlight, typename Op>
__device__ __forceinline__ void reduce_two(const Sources& sources, std::byte* out, int end, const Op& op, int thread) {
  const float factor = op.divisor == 2 ? 0.5f : 1.0f;  // halving rounds as the division by 2 does
  for (int first = thread * kPackBytes; first < end; first += kInFlight * kRow) {
    const int count = (end - first + kRow - 1) / kRow;
    reduce_row<dtype, kInFlight>(sources.at[0] + first, sources.at[1] + first, out + first, count, op, factor);
  }
}

// A piece that is there: `bytes` of every rank, in packs where the user's memory allows. In flight: so many packs of
// each of two ranks, if there are two, or if there are more.
template <Dtype dtype, int kOfTwo, int kOfMore, typename Op>
__device__ __forceinline__ void reduce_piece(const Sources& sources, int rank, int world, std::byte* out, int bytes,
                                             const Op& op, int thread, int threads) {
  using Single = std::make_unsigned_t<typename arithmetic::Element<dtype>::Stored>;
  const bool packs = is_vector_aligned(out) && is_vector_aligned(sources.at[rank]);
  const int whole = packs ? bytes / kPackBytes * kPackBytes : 0;
  if (kOfTwo > 1 && world == 2) {
    reduce_two<dtype, kOfTwo>(sources, out, whole, op, thread);
  } else {
    reduce_units<dtype, uint4, kOfMore>(sources, world, out, 0, whole, op, thread, threads);
  }
  reduce_units<dtype, Single, 2>(sources, world, out, whole, bytes, op, thread, threads);
}

// A piece that comes as lines; waits for each. False if the wait gave up, or there is nothing to wait for: `handed`
// waits until the sources are known, which the first of the own values need not be.
template <Dtype dtype, int kInFlight, typename Op, typename Handed>
__device__ __forceinline__ bool reduce_lines(const Sources& sources, const std::byte* own, int rank, int world,
                                             std::byte* out, int bytes, const Op& op, int thread, int threads,
                                             Wait& wait, const Handed& handed) {
  const bool words = (reinterpret_cast<uintptr_t>(out) | reinterpret_cast<uintptr_t>(own)) % kLineData == 0;
  constexpr int kStride = kWarp * kLineData;
  const int place = thread / kWarp * kInFlight * kStride + thread % kWarp * kLineData;
  bool known = false;
  for (int first = place; first < bytes || !known; first += kInFlight * threads * kLineData) {
    Values<dtype, uint64_t> values[kInFlight];
    uint64_t mine[kInFlight];
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      const int at = first + k * kStride;
      mine[k] = 0;
      if (at >= bytes) continue;
      mine[k] = words ? load_line_data<uint64_t>(own + at, bytes - at) : load_line_data<uint8_t>(own + at, bytes - at);
    }
    if (!known) {
      if (!handed()) return false;
      known = true;
      wait.restart(sources.flags[rank == 0 ? 1 : 0] - 1);
    }
    for (int r = 0; r < world; ++r) {
      uint64_t data[kInFlight];
      bool complete;
      do {
        complete = true;
#pragma unroll
        for (int k = 0; k < kInFlight; ++k) {
          const int at = first + k * kStride;
          data[k] = mine[k];
          if (at >= bytes || r == rank) continue;
          uint64_t seen;
          ld_relaxed_sys_b128(sources.at[r] + 2 * at, data[k], seen);
          complete = complete && seen == sources.flags[r];
        }
      } while (!complete && wait.keep_on(r, sources.flags[r], sources.flags[r] - 1));
      if (!complete) return false;
#pragma unroll
      for (int k = 0; k < kInFlight; ++k) values[k].add(data[k], r == 0, op);
    }
    divide_all(values, op.divisor);
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      const int at = first + k * kStride;
      if (at >= bytes) continue;
      const uint64_t done = values[k].finish();
      if (words) {
        store_line_data<uint64_t>(out + at, bytes - at, done);
      } else {
        store_line_data<uint8_t>(out + at, bytes - at, done);
      }
    }
  }
  return true;
}

}  // namespace mnnvl::kernels
