// All-reduce of what the kernels don't specialise: gather every rank's elements, reduce them here with ATen in rank
// order. For the small integer and flag tensors that DDP and gradient scalers reduce; it moves world_size copies.
#pragma once

#include <ATen/ATen.h>
#include <torch/csrc/distributed/c10d/Types.hpp>

#include "backend/call.h"

namespace mnnvl::collectives {

// Throws TypeError or ValueError unless this path can reduce `tensor` with `op`: float32, float16, bfloat16, float64,
// integers, bool with SUM, PRODUCT, MIN, MAX; AVG for floating point; BAND, BOR, BXOR for integers and bool; SUM,
// AVG and PRODUCT for complex. Of bool, SUM and MAX are "or", PRODUCT and MIN "and", as in NCCL's backend.
void check_gathered_reduce(const at::Tensor& tensor, const c10d::ReduceOp& op);

// In place, on the current stream, below autograd. float16 and bfloat16 are reduced in float32 and rounded once. All
// memory
// is taken before anything is sent, and a failure of the arithmetic waits until the communication is over: neither
// leaves the peers alone.
// What the body needs to be kept alive is added to `landing`.
Body gathered_reduce_body(const at::Tensor& tensor, c10d::ReduceOp::RedOpType op, int world_size,
                          std::vector<at::Tensor>* landing);

}  // namespace mnnvl::collectives
