#include <ATen/MemoryOverlap.h>

#include <algorithm>

#include "backend/collectives/collectives.h"
#include "backend/tensors.h"

namespace mnnvl::collectives {
namespace {

constexpr const char* kIntoTensor =
    "all_gather_into_tensor";  // c10d's own word, and the profiler's, is _all_gather_base

// What this rank contributes, safe from the peers' contributions: they may arrive in `outputs` while it is still being
// read. Its own place alone may be the input itself.
at::Tensor safe_input(const at::Tensor& input, const Tensors& outputs, int rank) {
  const at::Tensor dense = input.contiguous();
  for (size_t r = 0; r < outputs.size(); ++r) {
    if (int(r) == rank && outputs[r].data_ptr() == dense.data_ptr()) continue;
    if (at::get_overlap_status(dense, outputs[r]) != at::MemOverlapStatus::No) return dense.clone();
  }
  return dense;
}

Body gather_body(const at::Tensor& input, const Tensors& outputs) {
  std::vector<void*> outs;
  std::vector<int64_t> sizes;
  bool even = true;
  for (const at::Tensor& output : outputs) {
    outs.push_back(output.data_ptr());
    sizes.push_back(int64_t(output.nbytes()));
    even = even && sizes.back() == sizes.front();
  }
  return [in = input.data_ptr(), even, sizes, outs](Transport& transport, const Run& run) {
    AllGatherRequest request;
    request.in = in;
    request.outs = outs.data();
    request.bytes = sizes.front();
    if (!even) request.sizes = sizes.data();
    transport.run(request, run);
  };
}

void check_list_output(const at::Tensor& output, const at::Tensor& input, bool own) {
  check_same(output, input, "all_gather", "tensor_list");
  check_tensor(output, "all_gather", "tensor_list");
  TORCH_CHECK_VALUE(!own || output.numel() == input.numel(),
                    "mnnvl all_gather: tensor_list: expected this rank's own tensor to have ", input.numel(),
                    " elements like the input, got ", output.numel());
  // Found here and not by the copy at the end, when the peers have done their part.
  TORCH_CHECK_VALUE(
      at::has_internal_overlap(output) != at::MemOverlap::Yes,
      "mnnvl all_gather: tensor_list: expected tensors whose elements have memory of their own, got sizes ",
      output.sizes(), " with strides ", output.strides(), " (expanded?); use .clone()");
}

void check_pair(GroupView group, const at::Tensor& output, const at::Tensor& input, const at::Tensor& first) {
  check_dense(input, kIntoTensor, "input");
  check_dense(output, kIntoTensor, "output");
  check_same_device(input, first, kIntoTensor, "input");
  check_same(output, input, kIntoTensor, "output");
  TORCH_CHECK_VALUE(output.is_contiguous() && input.is_contiguous(), "mnnvl ", kIntoTensor,
                    ": expected contiguous tensors");
  TORCH_CHECK_VALUE(output.numel() == input.numel() * group.size, "mnnvl ", kIntoTensor, ": output: expected ",
                    input.numel() * group.size, " elements, got ", output.numel());
}

Call gather_into_tensors(c10d::OpType type, const char* title, GroupView group, const Tensors& outputs,
                         const Tensors& inputs, const c10d::AllgatherOptions& options) {
  for (size_t i = 0; i < inputs.size(); ++i) check_pair(group, outputs[i], inputs[i], inputs[0]);
  Call call = make_call(type, title, inputs.empty() ? at::Device(at::kCPU) : inputs[0].device(), options);
  call.name = kIntoTensor;
  call.inputs = inputs;
  call.outputs = outputs;
  const at::AutoDispatchBelowADInplaceOrView below;
  std::vector<Body> bodies;
  for (size_t i = 0; i < inputs.size(); ++i) {
    if (inputs[i].numel() == 0 || group.size == 1) continue;
    const Tensors parts = outputs[i].view({group.size, -1}).unbind();
    call.landing.push_back(safe_input(inputs[i], parts, group.rank));
    bodies.push_back(gather_body(call.landing.back(), parts));
  }
  call.body = in_turn(std::move(bodies));
  if (group.size == 1) {
    call.epilogue = [outputs, inputs] {
      for (size_t i = 0; i < inputs.size(); ++i) outputs[i].view(-1).copy_(inputs[i].view(-1));
    };
  }
  return call;
}

}  // namespace

Call all_gather(GroupView group, std::vector<Tensors>& outputs, Tensors& inputs,
                const c10d::AllgatherOptions& options) {
  check_single(inputs, "all_gather");
  const at::Tensor& input = inputs[0];
  TORCH_CHECK_VALUE(outputs.size() == 1 && outputs[0].size() == size_t(group.size),
                    "mnnvl all_gather: tensor_list: expected ", group.size, " tensors, got ",
                    outputs.empty() ? 0 : outputs[0].size());
  const Tensors& wanted = outputs[0];
  for (int r = 0; r < group.size; ++r) check_list_output(wanted[r], input, r == group.rank);

  Call call = make_call(c10d::OpType::ALLGATHER, "mnnvl:all_gather", input.device(), options);
  call.inputs = inputs;
  call.outputs = wanted;
  if (group.size == 1) {
    call.epilogue = [output = wanted[0], input] { output.copy_(input.reshape(output.sizes())); };
    return call;
  }
  const auto empty = [](const at::Tensor& tensor) { return tensor.numel() == 0; };
  if (std::all_of(wanted.begin(), wanted.end(), empty)) return call;
  const at::AutoDispatchBelowADInplaceOrView below;
  // Where contributions land: the output itself unless it isn't contiguous.
  Tensors places;
  bool copies = false;
  for (const at::Tensor& output : wanted) {
    places.push_back(output.is_contiguous() ? output : at::empty_like(output, at::MemoryFormat::Contiguous));
    copies = copies || !output.is_contiguous();
  }
  const at::Tensor mine = safe_input(input, places, group.rank);
  call.body = gather_body(mine, places);
  if (copies) {
    call.epilogue = [places, wanted] {
      for (size_t r = 0; r < wanted.size(); ++r) {
        if (!wanted[r].is_contiguous()) wanted[r].copy_(places[r], /*non_blocking=*/true);
      }
    };
  }
  call.landing = std::move(places);
  call.landing.push_back(mine);
  return call;
}

Call all_gather_into_tensor(GroupView group, at::Tensor& output, at::Tensor& input,
                            const c10d::AllgatherOptions& options) {
  return gather_into_tensors(c10d::OpType::_ALLGATHER_BASE, "mnnvl:_all_gather_base", group, {output}, {input},
                             options);
}

Call all_gather_into_tensor_coalesced(GroupView group, Tensors& outputs, Tensors& inputs,
                                      const c10d::AllgatherOptions& options) {
  TORCH_CHECK_VALUE(outputs.size() == inputs.size(), "mnnvl all_gather_into_tensor_coalesced: outputs: expected ",
                    inputs.size(), " tensors like the inputs, got ", outputs.size());
  return gather_into_tensors(c10d::OpType::ALLGATHER_COALESCED, "mnnvl:all_gather_into_tensor_coalesced", group,
                             outputs, inputs, options);
}

}  // namespace mnnvl::collectives
