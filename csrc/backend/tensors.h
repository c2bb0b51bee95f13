// What the collectives accept, and where it lies: every check on user tensors, before anything is enqueued.
#pragma once

#include <ATen/ATen.h>
#include <torch/csrc/distributed/c10d/Types.hpp>

#include <vector>

#include "backend/call.h"
#include "protocol/types.h"

namespace mnnvl {

using Tensors = std::vector<at::Tensor>;

// One strided tensor of a supported device whose memory is there and holds its values as they are: neither quantised
// nor a conjugate or negative view. `op` and `argument` are for the error's text.
void check_tensor(const at::Tensor& tensor, const char* op, const char* argument);
// The same, and contiguous or of any other dense, non-overlapping format.
void check_dense(const at::Tensor& tensor, const char* op, const char* argument);
// The same, and every element has memory of its own.
void check_output(const at::Tensor& tensor, const char* op, const char* argument);
void check_same_device(const at::Tensor& tensor, const at::Tensor& like, const char* op, const char* argument);
// The device and the dtype.
void check_same(const at::Tensor& tensor, const at::Tensor& like, const char* op, const char* argument);
void check_numel(const at::Tensor& tensor, int64_t numel, const char* op, const char* argument);
// As many tensors as expected, of the device and the dtype of `like`.
void check_list(const Tensors& list, size_t count, const at::Tensor& like, const char* op, const char* argument);
// The only tensor of a list, checked by check_tensor() or check_dense().
const at::Tensor& only_tensor(const Tensors& tensors, const char* op);
const at::Tensor& only_dense_tensor(const Tensors& tensors, const char* op);
// The only list of several, or an empty one: what ranks that aren't the root give.
const Tensors& only_list(const std::vector<Tensors>& lists);
void check_root(GroupView group, int64_t root, const char* op);

// The device of a list that may be empty.
inline at::Device device_of(const Tensors& tensors) {
  return tensors.empty() ? at::Device(at::kCPU) : tensors[0].device();
}

// The elements of a dense tensor [numel], in the order in which they lie.
at::Tensor flattened(const at::Tensor& tensor);

// What a message says of its elements.
Dtype message_dtype(const at::Tensor& tensor);

// A reduction as requests have it. Of complex numbers, that of twice as many real ones.
struct Reduction {
  Dtype dtype;
  ReduceOp op;
};
// TypeError or ValueError for what can't be reduced. PREMUL_SUM is the sum of premultiplied() inputs.
Reduction reduction_of(const at::Tensor& tensor, const c10d::ReduceOp& op, const char* name, const char* argument);
// A PREMUL_SUM's input times its factor, rounded to the dtype, as dense as the tensor; of other operations the tensor.
at::Tensor premultiplied(const at::Tensor& tensor, const c10d::ReduceOp& op);

// Each rank's part of contiguous memory.
struct Parts {
  std::vector<void*> data;
  std::vector<int64_t> bytes;

  bool empty() const;
  bool even() const;
};
Parts parts_of(const Tensors& tensors);
Parts even_parts(const at::Tensor& whole, int count);

// A communication may write its outputs while it still reads its inputs, which all are contiguous. These are safe from
// each other: the tensor itself where it can be, else a copy, or memory to land in. The `own`-th of the others may be
// the tensor itself; -1: none may.
at::Tensor safe_input(const at::Tensor& input, const Tensors& outputs, int own);
at::Tensor safe_output(const at::Tensor& output, const Tensors& inputs, int own);
// What is left to do at the end: outputs that aren't their own places get what has landed there. Empty for nothing.
Local copy_back(const Tensors& places, const Tensors& outputs);
// All that a group of one does: the input's elements go to the output. Empty if it is the input.
Local copy_of(const at::Tensor& input, const at::Tensor& output);

// Calls of an output and an input each as one; `one` checks and makes each.
Call coalesced(const Call& whole, const Tensors& outputs, const Tensors& inputs,
               const std::function<Call(const at::Tensor& output, const at::Tensor& input)>& one);

}  // namespace mnnvl
