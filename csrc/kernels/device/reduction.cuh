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
  typename E::Wide v[kCount] = {};

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

// A pack of any kind, and one of the sums that have instructions of their own.
template <Dtype dtype, typename Op>
struct AnyPack {
  const Op& op;
  Values<dtype, uint64_t> low, high;

  __device__ __forceinline__ explicit AnyPack(const Op& its_op) : op(its_op) {}
  __device__ __forceinline__ void add(uint4 pack, bool first) {
    const ulonglong2 halves = *reinterpret_cast<const ulonglong2*>(&pack);
    low.add(halves.x, first, op);
    high.add(halves.y, first, op);
  }
  __device__ __forceinline__ uint4 finish() const {
    const ulonglong2 halves{low.finish(op.divisor), high.finish(op.divisor)};
    return *reinterpret_cast<const uint4*>(&halves);
  }
};
template <typename T>
struct SummedPack {
  const float divisor;
  Accumulator<T> sum;

  __device__ __forceinline__ explicit SummedPack(const Fixed<ReduceOp::kSum>& op) : divisor(float(op.divisor)) {}
  __device__ __forceinline__ void add(uint4 pack, bool first) {
    pack = without_negative_zero<T>(pack);
    if (first) {
      sum.begin(pack);
    } else {
      sum.add(pack);
    }
  }
  __device__ __forceinline__ uint4 finish() const { return sum.finish(divisor); }
};
template <Dtype dtype, typename Op>
struct PackOf {
  using type = AnyPack<dtype, Op>;
};
template <>
struct PackOf<Dtype::kFloat32, Fixed<ReduceOp::kSum>> {
  using type = SummedPack<float>;
};
template <>
struct PackOf<Dtype::kFloat16, Fixed<ReduceOp::kSum>> {
  using type = SummedPack<__half>;
};
template <>
struct PackOf<Dtype::kBFloat16, Fixed<ReduceOp::kSum>> {
  using type = SummedPack<__nv_bfloat16>;
};

constexpr int kWarpThreads = 32;

// Packs on their way from memory, a ring for each thread: more than registers would hold. Asynchronous copies, which
// nobody but the thread itself waits for.
template <int kThreads>
struct Staging {
  static constexpr int kDepth = 12;
  uint4 packs[kDepth][kThreads];
};

// Packs thread, thread + threads, ... of the ranks' bytes, from and to addresses that allow such accesses. The loads
// run ahead of the sums, through the ranks of one pack and on to the next.
template <Dtype dtype, typename Op, typename Staged>
__device__ __forceinline__ void reduce_packs(const Sources& sources, int world, std::byte* out, int packs, const Op& op,
                                             int thread, int threads, Staged& staged) {
  const int step = threads * kPackBytes;
  int ahead = thread, source = 0, filled = 0;  // what is loaded next, and where to
  const auto load_next = [&] {
    if (ahead < packs) {
      cp_async_16(&staged.packs[filled][thread], sources.at[source] + int64_t{ahead} * kPackBytes);
      if (++source == world) {
        source = 0;
        ahead += threads;
      }
    }
    cp_async_commit();
    filled = filled + 1 == Staged::kDepth ? 0 : filled + 1;
  };
#pragma unroll 1
  for (int i = 0; i < Staged::kDepth; ++i) load_next();
  std::byte* to = out + thread * kPackBytes;
#pragma unroll 1
  for (int pack = thread; pack < packs; pack += threads, to += step) {
    typename PackOf<dtype, Op>::type sum(op);
#pragma unroll 1
    for (int r = 0; r < world; ++r) {
      cp_async_wait<Staged::kDepth - 1>();  // the oldest is here; `filled` is its place
      sum.add(staged.packs[filled][thread], r == 0);
      load_next();
    }
    *reinterpret_cast<uint4*>(to) = sum.finish();
  }
}

// Single elements, in [begin, end) of the ranks' bytes; several loads of each rank in flight.
template <Dtype dtype, typename Op>
__device__ __forceinline__ void reduce_elements(const Sources& sources, int world, std::byte* out, int begin, int end,
                                                const Op& op, int thread, int threads) {
  using Single = std::make_unsigned_t<typename arithmetic::Element<dtype>::Stored>;
  constexpr int kInFlight = 4, kSize = int(sizeof(Single)), kStride = kWarpThreads * kSize;
  const int place = thread / kWarpThreads * kInFlight * kStride + thread % kWarpThreads * kSize;
#pragma unroll 1
  for (int first = begin + place; first < end; first += kInFlight * threads * kSize) {
    Values<dtype, Single> values[kInFlight];
#pragma unroll 1
    for (int r = 0; r < world; ++r) {
      const std::byte* source = sources.at[r] + first;
      Single loaded[kInFlight];
#pragma unroll
      for (int k = 0; k < kInFlight; ++k) {
        loaded[k] = first + k * kStride < end ? *reinterpret_cast<const Single*>(source + k * kStride) : Single(0);
      }
#pragma unroll
      for (int k = 0; k < kInFlight; ++k) values[k].add(loaded[k], r == 0, op);
    }
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      if (first + k * kStride < end) {
        *reinterpret_cast<Single*>(out + first + k * kStride) = values[k].finish(op.divisor);
      }
    }
  }
}

// A piece that is there: `bytes` of every rank, in packs where the user's memory allows.
template <Dtype dtype, typename Op, typename Staged>
__device__ __forceinline__ void reduce_piece(const Sources& sources, int rank, int world, std::byte* out, int bytes,
                                             const Op& op, int thread, int threads, Staged& staged) {
  const bool aligned = is_vector_aligned(out) && is_vector_aligned(sources.at[rank]);
  const int packs = aligned ? bytes / kPackBytes : 0;
  reduce_packs<dtype>(sources, world, out, packs, op, thread, threads, staged);
  reduce_elements<dtype>(sources, world, out, packs * kPackBytes, bytes, op, thread, threads);
}

// A piece that comes as lines; waits for each. False if the wait gave up, or there is nothing to wait for: `handed`
// waits until the sources are known, which the first of the own values need not be.
template <Dtype dtype, int kInFlight, typename Op, typename Handed>
__device__ __forceinline__ bool reduce_lines(const Sources& sources, const std::byte* own, int rank, int world,
                                             std::byte* out, int bytes, const Op& op, int thread, int threads,
                                             Wait& wait, const Handed& handed) {
  const bool words = (reinterpret_cast<uintptr_t>(out) | reinterpret_cast<uintptr_t>(own)) % kLineData == 0;
  constexpr int kStride = kWarpThreads * kLineData;
  const int place = thread / kWarpThreads * kInFlight * kStride + thread % kWarpThreads * kLineData;
  bool known = false;
#pragma unroll 1
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
