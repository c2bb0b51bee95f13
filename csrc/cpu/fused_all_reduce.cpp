#include <vector>

#include "cpu/fused_rows.h"
#include "cpu/operations.h"
#include "system/float_environment.h"

namespace mnnvl::cpu {

// Blocks of rows, each an all-reduce whose sums are finished while they are in the cache.
void run(Steps& steps, const FusedRequest& request, int64_t timeout_ms) {
  check_row_work(request.work);
  if (steps.world_size() == 1) return run_alone(request);
  const RowWork& work = request.work;
  const int64_t row_bytes = work.hidden * element_size(work.dtype);
  const int64_t block_rows = rows_of_block(row_bytes);
  std::vector<std::byte> sums(static_cast<size_t>(min64(block_rows, work.rows) * row_bytes));
  AllReduceRequest block;
  block.out = sums.data();
  block.dtype = work.dtype;
  block.strategy = request.strategy;
  for (int64_t row = 0; row < work.rows; row += block_rows) {
    const int64_t rows = min64(block_rows, work.rows - row);
    block.in = static_cast<const std::byte*>(request.in) + row * row_bytes;
    block.numel = rows * work.hidden;
    CallDescriptor call = descriptor_of(block);
    call.operation = operation_of(request);
    all_reduce(steps, block, call, timeout_ms);
    const FloatEnvironment ieee;
    finish_rows(work, row, rows, sums.data());
  }
  zero_padding(work);
}

}  // namespace mnnvl::cpu
