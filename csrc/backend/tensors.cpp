#include "backend/tensors.h"

#include <ATen/MemoryOverlap.h>

#include <algorithm>

#include "protocol/arithmetic.h"
#include "system/float_environment.h"

namespace mnnvl {
namespace {

Dtype dtype_of(at::ScalarType type) {
  switch (type) {
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

const char* name_of(const c10d::ReduceOp& op) {
  static constexpr const char* kNames[] = {"SUM", "AVG", "PRODUCT", "MIN", "MAX", "BAND", "BOR", "BXOR", "PREMUL_SUM"};
  return op.op_ < std::size(kNames) ? kNames[op.op_] : "an unknown operation";
}

void check_single(const Tensors& tensors, const char* op) {
  TORCH_CHECK_VALUE(tensors.size() == 1, "mnnvl ", op, ": expected one tensor per rank, got ", tensors.size());
}

bool overlap(const at::Tensor& a, const at::Tensor& b) {
  return at::get_overlap_status(a, b) != at::MemOverlapStatus::No;
}

// Whether `tensor` overlaps one of `others`, the own-th excepted if both begin at the same place.
bool overlaps_any(const at::Tensor& tensor, const Tensors& others, int own) {
  for (int i = 0; i < int(others.size()); ++i) {
    if (i == own && others[i].data_ptr() == tensor.data_ptr()) continue;
    if (overlap(tensor, others[i])) return true;
  }
  return false;
}

// What was freed by storage.resize_(0), as FSDP does, still has its shape.
bool has_memory(const at::Tensor& tensor) {
  if (tensor.numel() == 0) return true;
  int64_t last = tensor.storage_offset();
  for (int64_t i = 0; i < tensor.dim(); ++i) last += (tensor.sizes()[i] - 1) * tensor.strides()[i];
  return uint64_t(last + 1) * tensor.element_size() <= tensor.storage().nbytes();
}

}  // namespace

void check_tensor(const at::Tensor& tensor, const char* op, const char* argument) {
  TORCH_CHECK_VALUE(tensor.defined(), "mnnvl ", op, ": ", argument, ": expected a tensor, got an undefined one");
  TORCH_CHECK_VALUE(tensor.layout() == at::kStrided, "mnnvl ", op, ": ", argument,
                    ": expected a dense tensor, got layout ", tensor.layout(), "; use .to_dense()");
  TORCH_CHECK_VALUE(!tensor.is_nested(), "mnnvl ", op, ": ", argument,
                    ": expected one tensor, got a nested one; use .values()");
  TORCH_CHECK_VALUE(tensor.is_cpu() || tensor.is_cuda(), "mnnvl ", op, ": ", argument,
                    ": expected a CPU or CUDA tensor, got device ", tensor.device());
  // What moves is the memory, which holds the values before the view's conjugation or sign, and without their scale.
  TORCH_CHECK_VALUE(!tensor.is_conj(), "mnnvl ", op, ": ", argument,
                    ": expected a tensor with its values in memory, got a conjugate view; use .resolve_conj()");
  TORCH_CHECK_VALUE(!tensor.is_neg(), "mnnvl ", op, ": ", argument,
                    ": expected a tensor with its values in memory, got a negative view; use .resolve_neg()");
  TORCH_CHECK_TYPE(!tensor.is_quantized(), "mnnvl ", op, ": ", argument,
                   ": expected a tensor with its values in memory, got a quantized dtype, ", tensor.scalar_type(),
                   "; use .int_repr()");
  TORCH_CHECK_VALUE(has_memory(tensor), "mnnvl ", op, ": ", argument, ": expected a tensor with its values in memory, ",
                    "got one whose storage has only ", tensor.storage().nbytes(), " bytes");
}

void check_dense(const at::Tensor& tensor, const char* op, const char* argument) {
  check_tensor(tensor, op, argument);
  TORCH_CHECK_VALUE(tensor.is_non_overlapping_and_dense(), "mnnvl ", op, ": ", argument,
                    ": expected a dense, non-overlapping tensor, got sizes ", tensor.sizes(), " with strides ",
                    tensor.strides(), "; use .contiguous()");
}

void check_output(const at::Tensor& tensor, const char* op, const char* argument) {
  check_tensor(tensor, op, argument);
  // Found here and not by the copy at the end, when the peers have done their part.
  TORCH_CHECK_VALUE(at::has_internal_overlap(tensor) != at::MemOverlap::Yes, "mnnvl ", op, ": ", argument,
                    ": expected a tensor whose elements have memory of their own, got sizes ", tensor.sizes(),
                    " with strides ", tensor.strides(), " (expanded?); use .clone()");
}

void check_same_device(const at::Tensor& tensor, const at::Tensor& like, const char* op, const char* argument) {
  TORCH_CHECK_VALUE(tensor.defined(), "mnnvl ", op, ": ", argument, ": expected a tensor, got an undefined one");
  TORCH_CHECK_VALUE(tensor.device() == like.device(), "mnnvl ", op, ": ", argument, ": expected a tensor on ",
                    like.device(), ", got one on ", tensor.device());
}

void check_same(const at::Tensor& tensor, const at::Tensor& like, const char* op, const char* argument) {
  check_same_device(tensor, like, op, argument);
  TORCH_CHECK_TYPE(tensor.scalar_type() == like.scalar_type(), "mnnvl ", op, ": ", argument, ": expected dtype ",
                   like.scalar_type(), ", got ", tensor.scalar_type());
}

void check_numel(const at::Tensor& tensor, int64_t numel, const char* op, const char* argument) {
  TORCH_CHECK_VALUE(tensor.numel() == numel, "mnnvl ", op, ": ", argument, ": expected ", numel, " elements, got ",
                    tensor.numel());
}

void check_list(const Tensors& list, size_t count, const at::Tensor& like, const char* op, const char* argument) {
  TORCH_CHECK_VALUE(list.size() == count, "mnnvl ", op, ": ", argument, ": expected ", count, " tensors, got ",
                    list.size());
  for (const at::Tensor& tensor : list) check_same(tensor, like, op, argument);
}

const at::Tensor& only_tensor(const Tensors& tensors, const char* op) {
  check_single(tensors, op);
  check_tensor(tensors[0], op, "tensor");
  return tensors[0];
}

const at::Tensor& only_dense_tensor(const Tensors& tensors, const char* op) {
  check_single(tensors, op);
  check_dense(tensors[0], op, "tensor");
  return tensors[0];
}

const Tensors& only_list(const std::vector<Tensors>& lists) {
  static const auto* none = new Tensors;
  return lists.size() == 1 ? lists[0] : *none;
}

void check_root(GroupView group, int64_t root, const char* op) {
  TORCH_CHECK_VALUE(root >= 0 && root < group.size, "mnnvl ", op, ": root: expected 0 to ", group.size - 1, ", got ",
                    root);
}

at::Tensor flattened(const at::Tensor& tensor) {
  return tensor.as_strided({tensor.numel()}, {1}, tensor.storage_offset());
}

Dtype message_dtype(const at::Tensor& tensor) { return dtype_of(tensor.scalar_type()); }

namespace {
// That it is one number torch has looked at.
void check_factor(const at::Tensor& tensor, const c10d::ReduceOp& op, const char* name) {
  const at::Tensor& factor = static_cast<const c10d::NCCLPreMulSumSupplement&>(*op.supplement_).tensor_factor;
  if (!factor.defined()) return;
  TORCH_CHECK_TYPE(!factor.is_complex(), "mnnvl ", name, ": op: expected a real PREMUL_SUM factor, got ",
                   factor.scalar_type());
  TORCH_CHECK_VALUE(factor.is_cpu() || factor.device() == tensor.device(), "mnnvl ", name,
                    ": op: expected a PREMUL_SUM factor on the CPU or ", tensor.device(), ", got one on ",
                    factor.device());
}
}  // namespace

Reduction reduction_of(const at::Tensor& tensor, const c10d::ReduceOp& op, const char* name, const char* argument) {
  static_assert(int(ReduceOp::kBxor) == int(c10d::ReduceOp::BXOR));
  const at::ScalarType type = tensor.scalar_type();
  const bool complex = at::isComplexType(type);
  const Dtype dtype = dtype_of(complex ? c10::toRealValueType(type) : type);
  TORCH_CHECK_TYPE(arithmetic::is_reduced(dtype, ReduceOp::kSum), "mnnvl ", name, ": ", argument,
                   ": expected a floating-point, complex, integer or bool dtype that is reduced, got ", type);
  const bool premultiply = op.op_ == c10d::ReduceOp::PREMUL_SUM;
  const Reduction reduction{dtype, premultiply ? ReduceOp::kSum : ReduceOp(op.op_)};
  const bool fits = premultiply ? (complex || at::isFloatingType(type)) && op.supplement_
                                : arithmetic::is_reduced(dtype, reduction.op);
  const bool adds = reduction.op == ReduceOp::kSum || reduction.op == ReduceOp::kAvg;
  TORCH_CHECK_VALUE(fits && (adds || !complex), "mnnvl ", name, ": op: ", name_of(op), " is not supported for ", type);
  if (premultiply) check_factor(tensor, op, name);
  return reduction;
}

at::Tensor premultiplied(const at::Tensor& tensor, const c10d::ReduceOp& op) {
  if (op.op_ != c10d::ReduceOp::PREMUL_SUM) return tensor;
  const at::AutoDispatchBelowADInplaceOrView below;
  if (tensor.is_complex()) return at::view_as_complex(premultiplied(at::view_as_real(tensor), op));
  const FloatEnvironment ieee;
  const auto& by = static_cast<const c10d::NCCLPreMulSumSupplement&>(*op.supplement_);
  const at::ScalarType type = tensor.scalar_type(), wide = type == at::kDouble ? at::kDouble : at::kFloat;
  const at::Tensor factor =
      by.tensor_factor.defined() ? by.tensor_factor.to(wide).reshape({}) : at::scalar_tensor(by.double_factor, wide);
  at::Tensor product = tensor.to(wide).mul(factor);
  if (type == at::kFloat8_e4m3fn) product.clamp_(-448, 448);  // as reductions do; ATen would make NaN of it
  return product.to(type);
}

bool Parts::empty() const {
  return std::all_of(bytes.begin(), bytes.end(), [](int64_t some) { return some == 0; });
}

bool Parts::even() const {
  return std::all_of(bytes.begin(), bytes.end(), [&](int64_t some) { return some == bytes.front(); });
}

Parts parts_of(const Tensors& tensors) {
  Parts parts;
  for (const at::Tensor& tensor : tensors) {
    parts.data.push_back(tensor.data_ptr());
    parts.bytes.push_back(int64_t(tensor.nbytes()));
  }
  return parts;
}

Parts even_parts(const at::Tensor& whole, int count) {
  Parts parts;
  parts.bytes.assign(count, int64_t(whole.nbytes()) / count);
  for (int i = 0; i < count; ++i) parts.data.push_back(static_cast<char*>(whole.data_ptr()) + i * parts.bytes[i]);
  return parts;
}

at::Tensor safe_input(const at::Tensor& input, const Tensors& outputs, int own) {
  const at::AutoDispatchBelowADInplaceOrView below;
  const at::Tensor dense = input.contiguous();
  return overlaps_any(dense, outputs, own) ? dense.clone() : dense;
}

at::Tensor safe_output(const at::Tensor& output, const Tensors& inputs, int own) {
  if (output.is_contiguous() && !overlaps_any(output, inputs, own)) return output;
  return at::empty(output.sizes(), output.options());
}

Local copy_back(const Tensors& places, const Tensors& outputs) {
  Tensors from, to;
  for (size_t i = 0; i < outputs.size(); ++i) {
    if (places[i].is_same(outputs[i])) continue;
    from.push_back(places[i]);
    to.push_back(outputs[i]);
  }
  if (from.empty()) return nullptr;
  return [from, to] {
    for (size_t i = 0; i < to.size(); ++i) to[i].copy_(from[i], /*non_blocking=*/true);
  };
}

Local copy_of(const at::Tensor& input, const at::Tensor& output) {
  const bool same_place = input.data_ptr() == output.data_ptr() && input.is_contiguous() && output.is_contiguous();
  if (same_place || input.is_same(output)) return nullptr;
  return [input = safe_input(input, {output}, /*own=*/-1), output] { output.copy_(input.reshape(output.sizes())); };
}

Call coalesced(const Call& whole, const Tensors& outputs, const Tensors& inputs,
               const std::function<Call(const at::Tensor& output, const at::Tensor& input)>& one) {
  TORCH_CHECK_VALUE(outputs.size() == inputs.size(), "mnnvl ", whole.name, ": outputs: expected ", inputs.size(),
                    " tensors like the inputs, got ", outputs.size());
  std::vector<Call> calls;
  for (size_t i = 0; i < inputs.size(); ++i) {
    check_same_device(inputs[i], inputs[0], whole.name, "inputs");
    calls.push_back(one(outputs[i], inputs[i]));
  }
  return merged(whole, std::move(calls));
}

}  // namespace mnnvl
