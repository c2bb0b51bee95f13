#include "backend/tensors.h"

namespace mnnvl {

void check_tensor(const at::Tensor& tensor, const char* op, const char* argument) {
  TORCH_CHECK_VALUE(tensor.defined(), "mnnvl ", op, ": ", argument, ": expected a tensor, got an undefined one");
  TORCH_CHECK_VALUE(tensor.layout() == at::kStrided, "mnnvl ", op, ": ", argument,
                    ": expected a dense tensor, got layout ", tensor.layout(), "; use .to_dense()");
  TORCH_CHECK_VALUE(tensor.is_cpu() || tensor.is_cuda(), "mnnvl ", op, ": ", argument,
                    ": expected a CPU or CUDA tensor, got device ", tensor.device());
  // What moves is the memory, which holds the values before the view's conjugation or sign.
  TORCH_CHECK_VALUE(!tensor.is_conj(), "mnnvl ", op, ": ", argument,
                    ": expected a tensor with its values in memory, got a conjugate view; use .resolve_conj()");
  TORCH_CHECK_VALUE(!tensor.is_neg(), "mnnvl ", op, ": ", argument,
                    ": expected a tensor with its values in memory, got a negative view; use .resolve_neg()");
}

void check_dense(const at::Tensor& tensor, const char* op, const char* argument) {
  check_tensor(tensor, op, argument);
  TORCH_CHECK_VALUE(tensor.is_non_overlapping_and_dense(), "mnnvl ", op, ": ", argument,
                    ": expected a dense, non-overlapping tensor, got sizes ", tensor.sizes(), " with strides ",
                    tensor.strides(), "; use .contiguous()");
}

void check_single(const std::vector<at::Tensor>& tensors, const char* op) {
  TORCH_CHECK_VALUE(tensors.size() == 1, "mnnvl ", op, ": expected one tensor per rank, got ", tensors.size());
  check_dense(tensors[0], op, "tensor");
}

void check_same_device(const at::Tensor& tensor, const at::Tensor& like, const char* op, const char* argument) {
  TORCH_CHECK_VALUE(tensor.device() == like.device(), "mnnvl ", op, ": ", argument, ": expected a tensor on ",
                    like.device(), ", got one on ", tensor.device());
}

void check_same(const at::Tensor& tensor, const at::Tensor& like, const char* op, const char* argument) {
  check_same_device(tensor, like, op, argument);
  TORCH_CHECK_TYPE(tensor.scalar_type() == like.scalar_type(), "mnnvl ", op, ": ", argument, ": expected dtype ",
                   like.scalar_type(), ", got ", tensor.scalar_type());
}

std::optional<Dtype> kernel_dtype(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat: return Dtype::kFloat32;
    case at::kHalf: return Dtype::kFloat16;
    case at::kBFloat16: return Dtype::kBFloat16;
    default: return std::nullopt;
  }
}

std::optional<ReduceOp> kernel_op(const c10d::ReduceOp& op) {
  if (op == c10d::ReduceOp::SUM) return ReduceOp::kSum;
  if (op == c10d::ReduceOp::AVG) return ReduceOp::kAvg;
  return std::nullopt;
}

}  // namespace mnnvl
