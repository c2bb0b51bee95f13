#include "backend/collectives/collectives.h"

namespace mnnvl::collectives {
namespace {

Call reduce_all(Call call, GroupView group, const at::Tensor& tensor, const c10d::ReduceOp& op) {
  const Reduction reduction = reduction_of(tensor, op, call.name, "tensor");
  call.inputs = call.outputs = {tensor};
  if (tensor.numel() == 0) return call;
  const at::Tensor input = premultiplied(tensor, op);
  if (group.size == 1) {
    call.epilogue = copy_of(input, tensor);
    return call;
  }
  AllReduceRequest request;
  request.in = input.data_ptr();
  request.out = tensor.data_ptr();
  request.dtype = reduction.dtype;
  request.op = reduction.op;
  request.numel = int64_t(tensor.nbytes()) / element_size(reduction.dtype);
  call.body = [request](Transport& transport, const Run& run) { transport.run(request, run); };
  if (!input.is_same(tensor)) call.landing = {input};
  return call;
}

}  // namespace

Call all_reduce(GroupView group, Tensors& tensors, const c10d::AllreduceOptions& options) {
  const at::Tensor& tensor = only_dense_tensor(tensors, "all_reduce");
  Call call = make_call(c10d::OpType::ALLREDUCE, "mnnvl:all_reduce", tensor.device(), options);
  return reduce_all(std::move(call), group, tensor, options.reduceOp);
}

Call all_reduce_coalesced(GroupView group, Tensors& tensors, const c10d::AllreduceCoalescedOptions& options) {
  const Call whole =
      make_call(c10d::OpType::ALLREDUCE_COALESCED, "mnnvl:all_reduce_coalesced", device_of(tensors), options);
  std::vector<Call> calls;
  for (const at::Tensor& tensor : tensors) {
    check_dense(tensor, whole.name, "tensors");
    check_same_device(tensor, tensors[0], whole.name, "tensors");
    calls.push_back(reduce_all(whole, group, tensor, options.reduceOp));
  }
  return merged(whole, std::move(calls));
}

}  // namespace mnnvl::collectives
