// The reduction itself: the one place that decides the bits of a CPU collective. What they are: protocol/arithmetic.h,
// whose functions the portable reductions are made of. The float sums (is_float_sum()) have loops of their own for each
// instruction set, which give the same bits, for every length and alignment. Nothing adds to a product in one
// expression, so a compiler has nothing to contract.
#pragma once

#include <cstddef>
#include <cstdint>

#include "protocol/types.h"

namespace mnnvl::cpu {

enum class Isa : int { kPortable = 0, kNeon = 1, kAvx2 = 2, kAvx512 = 3 };
constexpr int kIsaCount = 4;

// sources[0 .. count): count >= 1 arrays of `numel` elements, of any alignment. `out` may be one of them; `second` is
// null or a second place for the same result and overlaps nothing. To be called inside a FloatEnvironment.
using ReduceFunction = void (*)(const std::byte* const* sources, int count, std::byte* out, std::byte* second,
                                int64_t numel);

// The fastest for this machine. Error(kInvalidArgument) for what isn't reduced (arithmetic::is_reduced()).
ReduceFunction reduce_function(Dtype dtype, ReduceOp op);

// A given instruction set's, or null where there is none in this build or for this machine.
ReduceFunction reduce_function(Isa isa, Dtype dtype, ReduceOp op);

const char* name(Isa isa);

namespace detail {
// The float sums of an instruction set, [dtype][op]; the caller checks the machine first.
#if defined(__x86_64__)
extern const ReduceFunction kReduceAvx2[3][2];
extern const ReduceFunction kReduceAvx512[3][2];
#elif defined(__aarch64__)
extern const ReduceFunction kReduceNeon[3][2];
#endif
}  // namespace detail

}  // namespace mnnvl::cpu
