// The reduction itself: the one place that decides the bits of a CPU all_reduce.
//
// For each element: s = x[0] + x[1] + ... + x[n-1] in float32, from left to right (rank order); for AVG s = s /
// divisor, a true division; then one rounding to the dtype, to nearest even (float16 overflows to infinity, subnormals
// are kept). Zeros: -0 inputs count as +0, and a result of -0 (also one that rounding made of a tiny negative number)
// is written as +0. NaNs: any NaN result is written as the NVIDIA GPU's canonical one: 0x7fffffff, 0x7fff, 0x7fff.
// Every instruction set gives these same bits, for every length and alignment. There is no multiplication, so nothing
// that a compiler could contract.
#pragma once

#include <cstddef>
#include <cstdint>

#include "protocol/types.h"

namespace mnnvl::cpu {

enum class Isa : int { kPortable = 0, kNeon = 1, kAvx2 = 2, kAvx512 = 3 };
constexpr int kIsaCount = 4;

// sources[0 .. count): count >= 1 arrays of `numel` elements. `out` may be one of them; `second` is null or a second
// place for the same result and overlaps nothing. `divisor` is used by AVG only. To be called inside a
// FloatEnvironment.
using ReduceFunction = void (*)(const std::byte* const* sources, int count, std::byte* out, std::byte* second,
                                int64_t numel, float divisor);

// The fastest for this machine.
ReduceFunction reduce_function(Dtype dtype, ReduceOp op);

// A given instruction set's, or null where this build or machine doesn't have it.
ReduceFunction reduce_function(Isa isa, Dtype dtype, ReduceOp op);

const char* name(Isa isa);

namespace detail {
// One per instruction set, [dtype][op]; the caller checks the machine first.
extern const ReduceFunction kReducePortable[3][2];
#if defined(__x86_64__)
extern const ReduceFunction kReduceAvx2[3][2];
extern const ReduceFunction kReduceAvx512[3][2];
#elif defined(__aarch64__)
extern const ReduceFunction kReduceNeon[3][2];
#endif
}  // namespace detail

}  // namespace mnnvl::cpu
