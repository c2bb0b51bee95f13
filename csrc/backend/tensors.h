// What the collectives accept: every check on user tensors, before anything is enqueued.
#pragma once

#include <ATen/ATen.h>
#include <torch/csrc/distributed/c10d/Types.hpp>

#include <vector>

#include "protocol/types.h"

namespace mnnvl {

// One dense tensor of a supported device: contiguous, or any other dense, non-overlapping format. `op` and `argument` are
// for the error's text.
void check_dense(const at::Tensor& tensor, const char* op, const char* argument);
void check_single(const std::vector<at::Tensor>& tensors, const char* op);
void check_same(const at::Tensor& tensor, const at::Tensor& like, const char* op, const char* argument);

// float32, float16, bfloat16; TypeError otherwise.
Dtype reduce_dtype(const at::Tensor& tensor);
// SUM, AVG; ValueError otherwise.
ReduceOp reduce_op(const c10d::ReduceOp& op);

}  // namespace mnnvl
