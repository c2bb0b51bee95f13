// Rows of a fused all-reduce, from their sums: protocol/fused_row.h on the CPU.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

#include "protocol/requests.h"

namespace mnnvl::cpu {

// Error(kInvalidArgument) for work that can't be done.
void check_row_work(const RowWork& work);

// All rows and the scales' padding, by blocks of rows that are finished while they are in the cache. `sum`: of `numel`
// elements of the input, to `sums`.
using SumRows = std::function<void(const std::byte* in, int64_t numel, std::byte* sums)>;
void finish_in_blocks(const FusedRequest& request, const SumRows& sum);

// All of the request in a group of one.
void run_alone(const FusedRequest& request);

}  // namespace mnnvl::cpu
