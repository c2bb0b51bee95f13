#include "backend/collectives/collectives.h"

namespace mnnvl::collectives {

Call gather(GroupView group, std::vector<Tensors>& outputs, Tensors& inputs, const c10d::GatherOptions& options) {
  const at::Tensor& input = only_tensor(inputs, "gather");
  Call call = make_call(c10d::OpType::GATHER, "mnnvl:gather", input.device(), options);
  check_root(group, options.rootRank, call.name);
  const bool is_root = options.rootRank == group.rank;
  const Tensors& wanted = only_list(outputs);
  check_list(wanted, is_root ? group.size : 0, input, call.name, "gather_list");
  for (const at::Tensor& output : wanted) {
    check_output(output, call.name, "gather_list");
    check_numel(output, input.numel(), call.name, "gather_list");
  }
  call.root = int(options.rootRank);
  call.inputs = inputs;
  call.outputs = wanted;
  if (input.numel() == 0) return call;
  if (group.size == 1) {
    call.epilogue = copy_of(input, wanted[0]);
    return call;
  }
  Tensors places;
  for (const at::Tensor& output : wanted) places.push_back(safe_output(output, {}, /*own=*/-1));
  const at::Tensor mine = safe_input(input, places, group.rank);
  call.body = [in = mine.data_ptr(), bytes = int64_t(mine.nbytes()), root = call.root, outs = parts_of(places).data](
                  Transport& transport, const Run& run) {
    transport.run(GatherRequest{in, outs.data(), bytes, root}, run);
  };
  call.epilogue = copy_back(places, wanted);
  call.landing = std::move(places);
  call.landing.push_back(mine);
  return call;
}

}  // namespace mnnvl::collectives
