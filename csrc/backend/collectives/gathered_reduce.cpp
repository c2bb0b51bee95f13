#include "backend/collectives/gathered_reduce.h"

#include <algorithm>
#include <vector>

#include "backend/tensors.h"

namespace mnnvl::collectives {
namespace {

using Op = c10d::ReduceOp::RedOpType;

constexpr int64_t kChunkElements = int64_t{1} << 20;  // bounds the gathered copies
// ATen shares larger CPU tensors among threads, whose flush-to-zero mode is whatever it was when they began; smaller
// ones are reduced on this thread, in the mode that every rank has here.
constexpr int64_t kCpuPieceElements = 32767;

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

void check_gathered_reduce(const at::Tensor& tensor, const c10d::ReduceOp& reduce_op) {
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

namespace {

// `chunk` = the reduction over dim 0 of `gathered` [world_size, chunk.numel()], in rank order.
void reduce_chunk(const at::Tensor& chunk, const at::Tensor& gathered, Op op) {
  const bool narrow = chunk.scalar_type() == at::kHalf || chunk.scalar_type() == at::kBFloat16;
  const at::Tensor all = narrow ? gathered.to(at::kFloat) : gathered;
  at::Tensor result = all[0];
  for (int64_t r = 1; r < all.size(0); ++r) result = combine(result, all[r], op);
  // By a tensor: CUDA divides by a number through its reciprocal, which rounds twice.
  if (op == Op::AVG) result = result.div(at::full({}, all.size(0), result.options()));
  chunk.copy_(result);
}

void reduce_in_pieces(const at::Tensor& chunk, const at::Tensor& gathered, Op op) {
  const int64_t piece = chunk.is_cpu() ? kCpuPieceElements : chunk.numel();
  for (int64_t begin = 0; begin < chunk.numel(); begin += piece) {
    const int64_t count = std::min(piece, chunk.numel() - begin);
    reduce_chunk(chunk.narrow(0, begin, count), gathered.narrow(1, begin, count), op);
  }
}

}  // namespace

Body gathered_reduce_body(const at::Tensor& tensor, Op op, int world_size, std::vector<at::Tensor>* landing) {
  const at::AutoDispatchBelowADInplaceOrView below;
  const at::Tensor flat = flattened(tensor);
  const at::Tensor gathered = at::empty({world_size * std::min(kChunkElements, flat.numel())}, flat.options());
  landing->push_back(gathered);
  return [flat, gathered, op, world_size](Transport& transport, const Run& run) {
    const at::AutoDispatchBelowADInplaceOrView below;
    std::exception_ptr failure;
    for (int64_t begin = 0; begin < flat.numel(); begin += kChunkElements) {
      const at::Tensor chunk = flat.narrow(0, begin, std::min(kChunkElements, flat.numel() - begin));
      const at::Tensor all = gathered.narrow(0, 0, world_size * chunk.numel()).view({world_size, chunk.numel()});
      std::vector<void*> outs;
      for (int r = 0; r < world_size; ++r) outs.push_back(all[r].data_ptr());
      AllGatherRequest request;
      request.in = chunk.data_ptr();
      request.outs = outs.data();
      request.bytes = int64_t(chunk.nbytes());
      transport.run(request, run);
      try {
        if (!failure) reduce_in_pieces(chunk, all, op);
      } catch (...) {
        failure = std::current_exception();
      }
    }
    if (failure) throw LocalFailure{failure};
  };
}

}  // namespace mnnvl::collectives
