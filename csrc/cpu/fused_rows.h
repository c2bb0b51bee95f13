// Rows of a fused all-reduce, from their sums: protocol/fused_row.h on the CPU.
#pragma once

#include <cstddef>
#include <cstdint>

#include "protocol/requests.h"

namespace mnnvl::cpu {

// Error(kInvalidArgument) for work that can't be done.
void check_row_work(const RowWork& work);

// Rows first .. first + count of `work`. `sums`: [count, hidden], overlaps nothing of it. To be called inside a
// FloatEnvironment.
void finish_rows(const RowWork& work, int64_t first, int64_t count, const std::byte* sums);
// Scales' padding; once a call.
void zero_padding(const RowWork& work);

// All of the request in a group of one.
void run_alone(const FusedRequest& request);

}  // namespace mnnvl::cpu
