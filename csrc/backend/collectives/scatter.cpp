#include "backend/collectives/collectives.h"

namespace mnnvl::collectives {

Call scatter(GroupView group, Tensors& outputs, std::vector<Tensors>& inputs, const c10d::ScatterOptions& options) {
  const at::Tensor& output = only_tensor(outputs, "scatter");
  Call call = make_call(c10d::OpType::SCATTER, "mnnvl:scatter", output.device(), options);
  check_output(output, call.name, "tensor");
  check_root(group, options.rootRank, call.name);
  const bool is_root = options.rootRank == group.rank;
  const Tensors& parts = only_list(inputs);
  check_list(parts, is_root ? group.size : 0, output, call.name, "scatter_list");
  for (const at::Tensor& part : parts) {
    check_tensor(part, call.name, "scatter_list");
    check_numel(part, output.numel(), call.name, "scatter_list");
  }
  call.root = int(options.rootRank);
  call.inputs = parts;
  call.outputs = outputs;
  if (output.numel() == 0) return call;
  if (group.size == 1) {
    call.epilogue = copy_of(parts[0], output);
    return call;
  }
  Tensors dense;
  for (const at::Tensor& part : parts) dense.push_back(safe_input(part, {}, /*own=*/-1));
  const at::Tensor place = safe_output(output, dense, group.rank);
  call.body = [out = place.data_ptr(), bytes = int64_t(place.nbytes()), root = call.root, ins = parts_of(dense).data](
                  Transport& transport, const Run& run) {
    transport.run(ScatterRequest{ins.data(), out, bytes, root}, run);
  };
  call.epilogue = copy_back({place}, {output});
  call.landing = std::move(dense);
  call.landing.push_back(place);
  return call;
}

}  // namespace mnnvl::collectives
