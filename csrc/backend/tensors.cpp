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

at::Tensor flattened(const at::Tensor& tensor) {
  return tensor.as_strided({tensor.numel()}, {1}, tensor.storage_offset());
}

Dtype message_dtype(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat: return Dtype::kFloat32;
    case at::kHalf: return Dtype::kFloat16;
    case at::kBFloat16: return Dtype::kBFloat16;
    case at::kDouble: return Dtype::kFloat64;
    case at::kChar: return Dtype::kInt8;
    case at::kByte: return Dtype::kUInt8;
    case at::kShort: return Dtype::kInt16;
    case at::kUInt16: return Dtype::kUInt16;
    case at::kInt: return Dtype::kInt32;
    case at::kUInt32: return Dtype::kUInt32;
    case at::kLong: return Dtype::kInt64;
    case at::kUInt64: return Dtype::kUInt64;
    case at::kBool: return Dtype::kBool;
    case at::kComplexFloat: return Dtype::kComplex64;
    case at::kComplexDouble: return Dtype::kComplex128;
    case at::kFloat8_e4m3fn: return Dtype::kFloat8E4M3;
    case at::kFloat8_e5m2: return Dtype::kFloat8E5M2;
    default: return Dtype::kOther;
  }
}

std::optional<Dtype> kernel_dtype(const at::Tensor& tensor) {
  const Dtype dtype = message_dtype(tensor);
  const bool added = dtype == Dtype::kFloat32 || dtype == Dtype::kFloat16 || dtype == Dtype::kBFloat16;
  return added ? std::optional<Dtype>(dtype) : std::nullopt;
}

std::optional<ReduceOp> kernel_op(const c10d::ReduceOp& op) {
  if (op == c10d::ReduceOp::SUM) return ReduceOp::kSum;
  if (op == c10d::ReduceOp::AVG) return ReduceOp::kAvg;
  return std::nullopt;
}

}  // namespace mnnvl
