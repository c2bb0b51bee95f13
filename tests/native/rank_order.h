// The sum by definition, for tests: element by element, in rank order, rounded through exact arithmetic. Slow, and
// written without a look at cpu/reduce.*.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "protocol/types.h"

namespace mnnvl::test {

// Element `i` of an array of `dtype` at any alignment: its bits, and what they mean.
uint32_t element_bits(const std::byte* array, int64_t i, Dtype dtype);
float element_value(uint32_t bits, Dtype dtype);
// The bits of `value` rounded to nearest even: -0 as +0, any NaN as the canonical one.
uint32_t rounded_bits(float value, Dtype dtype);

// inputs[r] is rank r's array; gives the bits of element i of the result.
uint32_t rank_order_bits(const std::vector<const std::byte*>& inputs, int64_t i, Dtype dtype, ReduceOp op);

}  // namespace mnnvl::test
