// The reductions by definition, for tests: element by element, in rank order, rounded through exact arithmetic. Slow,
// and written without a look at cpu/reduce.* and protocol/arithmetic.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "protocol/types.h"

namespace mnnvl::test {

// All that some reduction takes.
constexpr Dtype kNumberDtypes[] = {Dtype::kFloat32,    Dtype::kFloat16,    Dtype::kBFloat16, Dtype::kFloat64,
                                   Dtype::kFloat8E4M3, Dtype::kFloat8E5M2, Dtype::kInt8,     Dtype::kUInt8,
                                   Dtype::kInt16,      Dtype::kInt32,      Dtype::kInt64,    Dtype::kBool};
constexpr ReduceOp kReduceOps[] = {ReduceOp::kSum, ReduceOp::kAvg,  ReduceOp::kProduct, ReduceOp::kMin,
                                   ReduceOp::kMax, ReduceOp::kBand, ReduceOp::kBor,     ReduceOp::kBxor};
bool is_floating(Dtype dtype);
bool has_reduction(Dtype dtype, ReduceOp op);

// Element `i` of an array of `dtype` at any alignment: its bits, and what they mean as a floating-point number.
uint64_t element_bits(const std::byte* array, int64_t i, Dtype dtype);
double element_value(uint64_t bits, Dtype dtype);
// The bits of `value` rounded to nearest even: -0 as +0, any NaN as the canonical one.
uint64_t rounded_bits(double value, Dtype dtype);

// inputs[r] is rank r's array; gives the bits of element i of the result.
uint64_t rank_order_bits(const std::vector<const std::byte*>& inputs, int64_t i, Dtype dtype, ReduceOp op);

}  // namespace mnnvl::test
