#include "backend/collectives/collectives.h"

namespace mnnvl::collectives {

Call reduce(GroupView group, Tensors& tensors, const c10d::ReduceOptions& options) {
  const at::Tensor& tensor = only_dense_tensor(tensors, "reduce");
  check_root(group, options.rootRank, "reduce");
  const Reduction reduction = reduction_of(tensor, options.reduceOp, "reduce", "tensor");
  Call call = make_call(c10d::OpType::REDUCE, "mnnvl:reduce", tensor.device(), options);
  call.root = int(options.rootRank);
  call.inputs = call.outputs = tensors;
  if (tensor.numel() == 0) return call;
  const at::Tensor input = premultiplied(tensor, options.reduceOp);
  if (group.size == 1) {
    call.epilogue = copy_of(input, tensor);
    return call;
  }
  ReduceRequest request;
  request.in = input.data_ptr();
  request.root = call.root;
  request.out = request.root == group.rank ? tensor.data_ptr() : nullptr;
  request.dtype = reduction.dtype;
  request.op = reduction.op;
  request.numel = int64_t(tensor.nbytes()) / element_size(reduction.dtype);
  call.body = [request](Transport& transport, const Run& run) { transport.run(request, run); };
  if (!input.is_same(tensor)) call.landing = {input};
  return call;
}

}  // namespace mnnvl::collectives
