#include "backend/collectives/collectives.h"

namespace mnnvl::collectives {
namespace {

constexpr const char* kIntoTensor =
    "all_gather_into_tensor";  // c10d's own word, and the profiler's, is _all_gather_base

Body gather_body(const at::Tensor& input, Parts places) {
  const bool even = places.even();
  return [in = input.data_ptr(), places = std::move(places), even](Transport& transport, const Run& run) {
    AllGatherRequest request;
    request.in = in;
    request.outs = places.data.data();
    request.bytes = places.bytes.front();
    if (!even) request.sizes = places.bytes.data();
    transport.run(request, run);
  };
}

Call gather_into_tensor(Call call, GroupView group, const at::Tensor& output, const at::Tensor& input) {
  call.name = kIntoTensor;
  check_tensor(input, kIntoTensor, "input");
  check_dense(output, kIntoTensor, "output");
  check_same(output, input, kIntoTensor, "output");
  TORCH_CHECK_VALUE(output.is_contiguous(), "mnnvl ", kIntoTensor, ": output: expected a contiguous tensor");
  check_numel(output, input.numel() * group.size, kIntoTensor, "output");
  call.inputs = {input};
  call.outputs = {output};
  if (group.size == 1) {
    call.epilogue = copy_of(input, output);
    return call;
  }
  if (input.numel() == 0) return call;
  Parts places = even_parts(output, group.size);
  const bool in_place = input.is_contiguous() && input.data_ptr() == places.data[group.rank];
  const at::Tensor mine = in_place ? input : safe_input(input, {output}, /*own=*/-1);
  call.body = gather_body(mine, std::move(places));
  call.landing = {mine};
  return call;
}

// `name`: of the list, in errors.
Call gather_into_list(Call call, GroupView group, const Tensors& outputs, const at::Tensor& input, const char* name) {
  check_list(outputs, group.size, input, call.name, name);
  for (const at::Tensor& output : outputs) check_output(output, call.name, name);
  const at::Tensor& own = outputs[group.rank];
  TORCH_CHECK_VALUE(own.numel() == input.numel(), "mnnvl ", call.name, ": ", name,
                    ": expected this rank's own tensor to have ", input.numel(), " elements like the input, got ",
                    own.numel());
  call.inputs = {input};
  call.outputs = outputs;
  if (group.size == 1) {
    call.epilogue = copy_of(input, own);
    return call;
  }
  Tensors places;
  for (const at::Tensor& output : outputs) places.push_back(safe_output(output, {}, /*own=*/-1));
  Parts parts = parts_of(places);
  if (parts.empty()) return call;
  const at::Tensor mine = safe_input(input, places, group.rank);
  call.body = gather_body(mine, std::move(parts));
  call.epilogue = copy_back(places, outputs);
  call.landing = std::move(places);
  call.landing.push_back(mine);
  return call;
}

}  // namespace

Call all_gather(GroupView group, std::vector<Tensors>& outputs, Tensors& inputs,
                const c10d::AllgatherOptions& options) {
  const at::Tensor& input = only_tensor(inputs, "all_gather");
  Call call = make_call(c10d::OpType::ALLGATHER, "mnnvl:all_gather", input.device(), options);
  return gather_into_list(std::move(call), group, only_list(outputs), input, "tensor_list");
}

Call all_gather_coalesced(GroupView group, std::vector<Tensors>& outputs, Tensors& inputs,
                          const c10d::AllgatherOptions& options) {
  const Call whole =
      make_call(c10d::OpType::ALLGATHER_COALESCED, "mnnvl:all_gather_coalesced", device_of(inputs), options);
  constexpr const char* kLists = "output_tensor_lists";  // one a rank, each with a tensor for every input
  TORCH_CHECK_VALUE(outputs.size() == size_t(group.size), "mnnvl ", whole.name, ": ", kLists, ": expected ", group.size,
                    " lists, got ", outputs.size());
  for (const Tensors& list : outputs) {
    TORCH_CHECK_VALUE(list.size() == inputs.size(), "mnnvl ", whole.name, ": ", kLists, ": expected lists of ",
                      inputs.size(), " tensors like the inputs, got ", list.size());
  }
  std::vector<Call> calls;
  for (size_t i = 0; i < inputs.size(); ++i) {
    check_tensor(inputs[i], whole.name, "input_tensor_list");
    check_same_device(inputs[i], inputs[0], whole.name, "input_tensor_list");
    Tensors wanted;
    for (const Tensors& list : outputs) wanted.push_back(list[i]);
    calls.push_back(gather_into_list(whole, group, wanted, inputs[i], kLists));
  }
  return merged(whole, std::move(calls));
}

Call all_gather_into_tensor(GroupView group, at::Tensor& output, at::Tensor& input,
                            const c10d::AllgatherOptions& options) {
  Call call = make_call(c10d::OpType::_ALLGATHER_BASE, "mnnvl:_all_gather_base", input.device(), options);
  return gather_into_tensor(std::move(call), group, output, input);
}

Call all_gather_into_tensor_coalesced(GroupView group, Tensors& outputs, Tensors& inputs,
                                      const c10d::AllgatherOptions& options) {
  const Call whole = make_call(c10d::OpType::ALLGATHER_COALESCED, "mnnvl:all_gather_into_tensor_coalesced",
                               device_of(inputs), options);
  return coalesced(whole, outputs, inputs, [&](const at::Tensor& output, const at::Tensor& input) {
    return gather_into_tensor(whole, group, output, input);
  });
}

}  // namespace mnnvl::collectives
