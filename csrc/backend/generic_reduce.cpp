#include "backend/generic_reduce.h"

#include <ATen/core/LegacyTypeDispatch.h>

#include <algorithm>
#include <vector>

namespace mnnvl {
namespace {

using Op = c10d::ReduceOp::RedOpType;

constexpr int64_t kChunkElements = int64_t{1} << 20;  // bounds the gathered copies

const char* name(Op op) {
  static constexpr const char* kNames[] = {"SUM", "AVG", "PRODUCT", "MIN", "MAX", "BAND", "BOR", "BXOR", "PREMUL_SUM"};
  return static_cast<size_t>(op) < std::size(kNames) ? kNames[static_cast<size_t>(op)] : "an unknown operation";
}

at::Tensor combine(const at::Tensor& a, const at::Tensor& b, Op op) {
  const bool flags = a.scalar_type() == at::kBool;
  switch (op) {
    case Op::SUM:
    case Op::AVG: return flags ? a.logical_or(b) : a.add(b);
    case Op::PRODUCT: return flags ? a.logical_and(b) : a.mul(b);
    case Op::MIN: return at::minimum(a, b);
    case Op::MAX: return at::maximum(a, b);
    case Op::BAND: return a.bitwise_and(b);
    case Op::BOR: return a.bitwise_or(b);
    case Op::BXOR: return a.bitwise_xor(b);
    default: break;
  }
  TORCH_INTERNAL_ASSERT(false, "checked before");
}

}  // namespace

void check_generic_reduce(const at::Tensor& tensor, const c10d::ReduceOp& reduce_op) {
  const Op op = reduce_op.op_;
  const at::ScalarType type = tensor.scalar_type();
  const bool integral = at::isIntegralType(type, /*includeBool=*/true);
  const bool floating = type == at::kFloat || type == at::kHalf || type == at::kBFloat16 || type == at::kDouble;
  const bool complex = type == at::kComplexFloat || type == at::kComplexDouble;
  const bool unsigned_wide = type == at::kUInt16 || type == at::kUInt32 || type == at::kUInt64;  // no ATen arithmetic
  TORCH_CHECK_TYPE((integral || floating || complex) && !unsigned_wide,
                   "mnnvl all_reduce: tensor: expected a floating-point, complex, integer or bool dtype, got ", type);
  const bool fits = op == Op::SUM || op == Op::PRODUCT                  ? true
                    : op == Op::AVG                                     ? floating || complex
                    : op == Op::MIN || op == Op::MAX                    ? !complex
                    : op == Op::BAND || op == Op::BOR || op == Op::BXOR ? integral
                                                                        : false;
  TORCH_CHECK_VALUE(fits, "mnnvl all_reduce: op: ", name(op), " is not supported for ", type);
}

void generic_all_reduce(Transport& transport, const at::Tensor& tensor, Op op, int world_size, void* stream) {
  at::AutoDispatchBelowADInplaceOrView no_autograd;
  const at::Tensor flat = tensor.as_strided({tensor.numel()}, {1}, tensor.storage_offset());
  const bool narrow = tensor.scalar_type() == at::kHalf || tensor.scalar_type() == at::kBFloat16;
  for (int64_t begin = 0; begin < flat.numel(); begin += kChunkElements) {
    const at::Tensor chunk = flat.narrow(0, begin, std::min(kChunkElements, flat.numel() - begin));
    const at::Tensor gathered = at::empty({world_size, chunk.numel()}, chunk.options());
    std::vector<void*> outs;
    for (int r = 0; r < world_size; ++r) outs.push_back(gathered[r].data_ptr());
    transport.all_gather(chunk.data_ptr(), outs.data(), int64_t(chunk.nbytes()), stream);
    const at::Tensor all = narrow ? gathered.to(at::kFloat) : gathered;
    at::Tensor result = all[0];
    for (int r = 1; r < world_size; ++r) result = combine(result, all[r], op);
    // By a tensor: CUDA divides by a number through its reciprocal, which rounds twice.
    if (op == Op::AVG) result = result.div(at::full({}, world_size, result.options()));
    chunk.copy_(result);
  }
}

}  // namespace mnnvl
