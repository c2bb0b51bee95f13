#include "cpu/fused_rows.h"
#include "cpu/operations.h"

namespace mnnvl::cpu {

// Blocks of rows, each an all-reduce.
void run(Steps& steps, const FusedRequest& request, int64_t timeout_ms) {
  if (steps.world_size() == 1) return run_alone(request);
  check_row_work(request.work);
  AllReduceRequest block;
  block.dtype = request.work.dtype;
  block.strategy = request.strategy;
  finish_in_blocks(request, [&](const std::byte* in, int64_t numel, std::byte* sums) {
    block.in = in;
    block.out = sums;
    block.numel = numel;
    CallDescriptor call = descriptor_of(block);
    call.operation = operation_of(request);
    all_reduce(steps, block, call, timeout_ms);
  });
}

}  // namespace mnnvl::cpu
