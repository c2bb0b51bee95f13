// What the collectives accept: every check on user tensors, before anything is enqueued.
#pragma once

#include <ATen/ATen.h>
#include <torch/csrc/distributed/c10d/Types.hpp>

#include <optional>
#include <vector>

#include "protocol/types.h"

namespace mnnvl {

// One strided tensor of a supported device whose memory holds its values as they are: neither a conjugate nor a
// negative view. `op` and `argument` are for the error's text.
void check_tensor(const at::Tensor& tensor, const char* op, const char* argument);
// The same, and contiguous or of any other dense, non-overlapping format.
void check_dense(const at::Tensor& tensor, const char* op, const char* argument);
void check_single(const std::vector<at::Tensor>& tensors, const char* op);
void check_same_device(const at::Tensor& tensor, const at::Tensor& like, const char* op, const char* argument);
// The device and the dtype.
void check_same(const at::Tensor& tensor, const at::Tensor& like, const char* op, const char* argument);

// The elements of a dense tensor [numel], in the order in which they lie.
at::Tensor flattened(const at::Tensor& tensor);

// What a message says of its elements.
Dtype message_dtype(const at::Tensor& tensor);

// What the all-reduce kernels reduce: SUM and AVG of float32, float16 and bfloat16. Nothing for any other.
std::optional<Dtype> kernel_dtype(const at::Tensor& tensor);
std::optional<ReduceOp> kernel_op(const c10d::ReduceOp& op);

}  // namespace mnnvl
