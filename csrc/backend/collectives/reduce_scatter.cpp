#include "backend/collectives/collectives.h"

namespace mnnvl::collectives {
namespace {

constexpr const char* kTensor = "reduce_scatter_tensor";  // c10d's own word is _reduce_scatter_base

// `parts`, which are contiguous, and `place` are kept alive by the call.
Body reduce_body(Parts parts, const at::Tensor& place, Reduction reduction) {
  const bool even = parts.even();
  for (int64_t& bytes : parts.bytes) bytes /= element_size(reduction.dtype);
  return [parts = std::move(parts), even, out = place.data_ptr(), reduction](Transport& transport, const Run& run) {
    ReduceScatterRequest request;
    request.ins = parts.data.data();
    request.out = out;
    request.numel = parts.bytes.front();
    if (!even) request.numels = parts.bytes.data();
    request.dtype = reduction.dtype;
    request.op = reduction.op;
    transport.run(request, run);
  };
}

Call scatter_tensor(Call call, GroupView group, const at::Tensor& output, const at::Tensor& input,
                    const c10d::ReduceOp& op) {
  call.name = kTensor;
  check_tensor(input, kTensor, "input");
  check_output(output, kTensor, "output");
  check_same(output, input, kTensor, "output");
  check_numel(input, output.numel() * group.size, kTensor, "input");
  const Reduction reduction = reduction_of(input, op, kTensor, "input");
  call.inputs = {input};
  call.outputs = {output};
  if (output.numel() == 0) return call;
  const at::AutoDispatchBelowADInplaceOrView below;
  const at::Tensor whole = premultiplied(input.contiguous(), op);
  if (group.size == 1) {
    call.epilogue = copy_of(whole, output);
    return call;
  }
  Parts parts = even_parts(whole, group.size);
  const bool in_place = output.is_contiguous() && output.data_ptr() == parts.data[group.rank];
  const at::Tensor place = in_place ? output : safe_output(output, {whole}, /*own=*/-1);
  call.body = reduce_body(std::move(parts), place, reduction);
  call.epilogue = copy_back({place}, {output});
  call.landing = {whole, place};
  return call;
}

}  // namespace

Call reduce_scatter(GroupView group, Tensors& outputs, std::vector<Tensors>& inputs,
                    const c10d::ReduceScatterOptions& options) {
  const at::Tensor& output = only_tensor(outputs, "reduce_scatter");
  Call call = make_call(c10d::OpType::REDUCE_SCATTER, "mnnvl:reduce_scatter", output.device(), options);
  check_output(output, call.name, "output");
  const Tensors& list = only_list(inputs);
  check_list(list, group.size, output, call.name, "input_list");
  for (const at::Tensor& input : list) check_tensor(input, call.name, "input_list");
  check_numel(list[group.rank], output.numel(), call.name, "input_list: this rank's own tensor");
  const Reduction reduction = reduction_of(output, options.reduceOp, call.name, "output");
  call.inputs = list;
  call.outputs = outputs;
  Tensors dense;
  const at::AutoDispatchBelowADInplaceOrView below;
  for (const at::Tensor& input : list) dense.push_back(premultiplied(input.contiguous(), options.reduceOp));
  if (group.size == 1) {
    call.epilogue = copy_of(dense[0], output);
    return call;
  }
  Parts parts = parts_of(dense);
  if (parts.empty()) return call;
  const at::Tensor place = safe_output(output, dense, group.rank);
  call.body = reduce_body(std::move(parts), place, reduction);
  call.epilogue = copy_back({place}, {output});
  call.landing = std::move(dense);
  call.landing.push_back(place);
  return call;
}

Call reduce_scatter_tensor(GroupView group, at::Tensor& output, at::Tensor& input,
                           const c10d::ReduceScatterOptions& options) {
  Call call = make_call(c10d::OpType::_REDUCE_SCATTER_BASE, "mnnvl:_reduce_scatter_base", input.device(), options);
  return scatter_tensor(std::move(call), group, output, input, options.reduceOp);
}

Call reduce_scatter_tensor_coalesced(GroupView group, Tensors& outputs, Tensors& inputs,
                                     const c10d::ReduceScatterOptions& options) {
  const Call whole = make_call(c10d::OpType::_REDUCE_SCATTER_BASE, "mnnvl:reduce_scatter_tensor_coalesced",
                               device_of(inputs), options);
  return coalesced(whole, outputs, inputs, [&](const at::Tensor& output, const at::Tensor& input) {
    return scatter_tensor(whole, group, output, input, options.reduceOp);
  });
}

}  // namespace mnnvl::collectives
