#include "backend/collectives/collectives.h"

namespace mnnvl::collectives {

Call broadcast(GroupView group, Tensors& tensors, const c10d::BroadcastOptions& options) {
  const at::Tensor& tensor = only_dense_tensor(tensors, "broadcast");
  check_root(group, options.rootRank, "broadcast");
  Call call = make_call(c10d::OpType::BROADCAST, "mnnvl:broadcast", tensor.device(), options);
  call.root = int(options.rootRank);
  call.inputs = call.outputs = tensors;
  if (group.size == 1 || tensor.numel() == 0) return call;
  BroadcastRequest request;
  request.data = tensor.data_ptr();
  request.bytes = int64_t(tensor.nbytes());
  request.root = call.root;
  call.body = [request](Transport& transport, const Run& run) { transport.run(request, run); };
  return call;
}

}  // namespace mnnvl::collectives
