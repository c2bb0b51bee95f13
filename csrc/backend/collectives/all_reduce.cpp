#include "backend/collectives/collectives.h"
#include "backend/collectives/gathered_reduce.h"
#include "backend/tensors.h"

namespace mnnvl::collectives {
namespace {

// Checks the arguments too; empty for no elements.
Body reduce_body(GroupView group, const at::Tensor& tensor, const c10d::ReduceOp& reduce_op, Tensors* landing) {
  const std::optional<Dtype> dtype = kernel_dtype(tensor);
  const std::optional<ReduceOp> op = kernel_op(reduce_op);
  const bool by_kernel = dtype && op;
  if (!by_kernel) check_gathered_reduce(tensor, reduce_op);
  if (group.size == 1 || tensor.numel() == 0) return nullptr;
  if (!by_kernel) return gathered_reduce_body(tensor, reduce_op.op_, group.size, landing);
  AllReduceRequest request;
  request.in = request.out = tensor.data_ptr();
  request.numel = tensor.numel();
  request.dtype = *dtype;
  request.op = *op;
  return [request](Transport& transport, const Run& run) { transport.run(request, run); };
}

Call reduce_all(c10d::OpType type, const char* title, GroupView group, const Tensors& tensors,
                const c10d::AllreduceOptions& options) {
  Call call = make_call(type, title, tensors.empty() ? at::Device(at::kCPU) : tensors[0].device(), options);
  call.inputs = call.outputs = tensors;
  std::vector<Body> bodies;
  for (const at::Tensor& tensor : tensors) {
    if (Body body = reduce_body(group, tensor, options.reduceOp, &call.landing)) bodies.push_back(std::move(body));
  }
  call.body = in_turn(std::move(bodies));
  return call;
}

}  // namespace

Call all_reduce(GroupView group, Tensors& tensors, const c10d::AllreduceOptions& options) {
  check_single(tensors, "all_reduce");
  return reduce_all(c10d::OpType::ALLREDUCE, "mnnvl:all_reduce", group, tensors, options);
}

Call all_reduce_coalesced(GroupView group, Tensors& tensors, const c10d::AllreduceCoalescedOptions& options) {
  constexpr const char* kName = "all_reduce_coalesced";
  for (const at::Tensor& tensor : tensors) {
    check_dense(tensor, kName, "tensors");
    check_same_device(tensor, tensors[0], kName, "tensors");
  }
  return reduce_all(c10d::OpType::ALLREDUCE_COALESCED, "mnnvl:all_reduce_coalesced", group, tensors, options);
}

}  // namespace mnnvl::collectives
