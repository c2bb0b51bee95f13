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
  __device__ __forceinline__ Unit finish(int divisor) const {
    using Bits = std::make_unsigned_t<Stored>;
    Unit unit = 0;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const auto value = divisor != 1 ? arithmetic::finish<ReduceOp::kAvg>(v[i], divisor) : v[i];
      unit |= Unit(Unit(Bits(E::narrow(value))) << (kBits * i));
    }
    return unit;
  }
};

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
      A done;
#pragma unroll
      for (int w = 0; w < A::kWords; ++w) done.words[w] = values[k][w].finish(op.divisor);
      *reinterpret_cast<A*>(out + first + k * kStride) = done;
    }
  }
}

// The same of two ranks, where no sum has to be kept while others are loaded: more loads are in flight.
template <Dtype dtype, int kInFlight, typename Op>
__device__ __forceinline__ void reduce_two(const Sources& sources, std::byte* out, int end, const Op& op, int thread,
                                           int threads) {
  using A = Access<uint4>;
  constexpr int kSize = int(sizeof(A)), kStride = kWarp * kSize;
  const int place = thread / kWarp * kInFlight * kStride + thread % kWarp * kSize;
  for (int first = place; first < end; first += kInFlight * threads * kSize) {
    A loaded[2][kInFlight];
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      const std::byte* source = sources.at[s] + first;
#pragma unroll
      for (int k = 0; k < kInFlight; ++k) {
        if (first + k * kStride < end) loaded[s][k] = *reinterpret_cast<const A*>(source + k * kStride);
      }
    }
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      if (first + k * kStride >= end) continue;
      A done;
#pragma unroll
      for (int w = 0; w < A::kWords; ++w) {
        Values<dtype, uint64_t> values;
        values.add(loaded[0][k].words[w], /*first=*/true, op);
        values.add(loaded[1][k].words[w], /*first=*/false, op);
        done.words[w] = values.finish(op.divisor);
      }
      *reinterpret_cast<A*>(out + first + k * kStride) = done;
    }
  }
}

// A piece that is there: `bytes` of every rank, in packs where the user's memory allows. `kInFlight`: of those, of two
// ranks; of more it is a half.
template <Dtype dtype, int kInFlight, typename Op>
__device__ __forceinline__ void reduce_piece(const Sources& sources, int rank, int world, std::byte* out, int bytes,
                                             const Op& op, int thread, int threads) {
  using Single = std::make_unsigned_t<typename arithmetic::Element<dtype>::Stored>;
  const bool packs = is_vector_aligned(out) && is_vector_aligned(sources.at[rank]);
  const int whole = packs ? bytes / kPackBytes * kPackBytes : 0;
  if (kInFlight > 1 && world == 2) {
    reduce_two<dtype, kInFlight>(sources, out, whole, op, thread, threads);
  } else {
    reduce_units<dtype, uint4, (kInFlight + 1) / 2>(sources, world, out, 0, whole, op, thread, threads);
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
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      const int at = first + k * kStride;
      if (at >= bytes) continue;
      const uint64_t done = values[k].finish(op.divisor);
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
