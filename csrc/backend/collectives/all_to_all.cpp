#include <algorithm>
#include <numeric>

#include "backend/collectives/collectives.h"

namespace mnnvl::collectives {
namespace {

constexpr const char* kSingle = "all_to_all_single";  // c10d's own word is alltoall_base

// Runs without elements of its own too: others may have some.
Body exchange_body(Parts from, Parts to, Dtype dtype) {
  return [from = std::move(from), to = std::move(to), dtype](Transport& transport, const Run& run) {
    AllToAllRequest request;
    request.ins = from.data.data();
    request.send_bytes = from.bytes.data();
    request.outs = to.data.data();
    request.receive_bytes = to.bytes.data();
    request.dtype = dtype;
    transport.run(request, run);
  };
}

// What this rank keeps is both sent and received by it.
void check_own(GroupView group, const Parts& from, const Parts& to, const char* name) {
  TORCH_CHECK_VALUE(from.bytes[group.rank] == to.bytes[group.rank], "mnnvl ", name,
                    ": output: expected this rank's own part to have ", from.bytes[group.rank],
                    " bytes like that of the input, got ", to.bytes[group.rank]);
}

// The rows of dim 0 that each rank's part has; `splits` empty: equal shares.
Parts split(GroupView group, const at::Tensor& tensor, const std::vector<int64_t>& splits, const char* argument) {
  TORCH_CHECK_VALUE(tensor.dim() > 0, "mnnvl ", kSingle, ": ", argument,
                    ": expected at least one dimension, got a scalar");
  const int64_t rows = tensor.size(0);
  if (splits.empty()) {
    TORCH_CHECK_VALUE(rows % group.size == 0, "mnnvl ", kSingle, ": ", argument, ": expected dim 0 to be divisible by ",
                      group.size, ", got sizes ", tensor.sizes());
    return even_parts(tensor, group.size);
  }
  const auto negative = [](int64_t split) { return split < 0; };
  TORCH_CHECK_VALUE(splits.size() == size_t(group.size) && std::none_of(splits.begin(), splits.end(), negative) &&
                        std::accumulate(splits.begin(), splits.end(), int64_t{0}) == rows,
                    "mnnvl ", kSingle, ": ", argument, "_split_sizes: expected ", group.size,
                    " sizes that add up to dim 0 of the tensor, ", rows, ", got ", splits);
  const int64_t row_bytes = rows == 0 ? 0 : int64_t(tensor.nbytes()) / rows;
  Parts parts;
  auto* data = static_cast<char*>(tensor.data_ptr());
  for (const int64_t split : splits) {
    parts.data.push_back(data);
    parts.bytes.push_back(split * row_bytes);
    data += parts.bytes.back();
  }
  return parts;
}

}  // namespace

Call all_to_all(GroupView group, Tensors& outputs, Tensors& inputs, const c10d::AllToAllOptions& options) {
  Call call = make_call(c10d::OpType::ALLTOALL, "mnnvl:all_to_all", device_of(inputs), options);
  if (!inputs.empty()) check_tensor(inputs[0], call.name, "input_tensor_list");
  TORCH_CHECK_VALUE(inputs.size() == size_t(group.size), "mnnvl ", call.name, ": input_tensor_list: expected ",
                    group.size, " tensors, got ", inputs.size());
  check_list(inputs, group.size, inputs[0], call.name, "input_tensor_list");
  check_list(outputs, group.size, inputs[0], call.name, "output_tensor_list");
  for (const at::Tensor& input : inputs) check_tensor(input, call.name, "input_tensor_list");
  for (const at::Tensor& output : outputs) check_output(output, call.name, "output_tensor_list");
  call.inputs = inputs;
  call.outputs = outputs;
  Tensors dense, places;
  for (const at::Tensor& input : inputs) dense.push_back(safe_input(input, {}, /*own=*/-1));
  for (const at::Tensor& output : outputs) places.push_back(safe_output(output, dense, /*own=*/-1));
  Parts from = parts_of(dense), to = parts_of(places);
  check_own(group, from, to, call.name);
  if (group.size == 1) {
    call.epilogue = copy_of(inputs[0], outputs[0]);
    return call;
  }
  call.body = exchange_body(std::move(from), std::move(to), message_dtype(inputs[0]));
  call.epilogue = copy_back(places, outputs);
  call.landing = std::move(dense);
  call.landing.insert(call.landing.end(), places.begin(), places.end());
  return call;
}

Call all_to_all_single(GroupView group, at::Tensor& output, at::Tensor& input, std::vector<int64_t>& output_splits,
                       std::vector<int64_t>& input_splits, const c10d::AllToAllOptions& options) {
  check_tensor(input, kSingle, "input");
  check_same(output, input, kSingle, "output");
  check_output(output, kSingle, "output");
  Call call = make_call(c10d::OpType::ALLTOALL_BASE, "mnnvl:all_to_all_single", input.device(), options);
  call.inputs = {input};
  call.outputs = {output};
  call.input_splits = input_splits;
  call.output_splits = output_splits;
  const at::Tensor dense = safe_input(input, {}, /*own=*/-1);
  const at::Tensor place = safe_output(output, {dense}, /*own=*/-1);
  Parts from = split(group, dense, input_splits, "input"), to = split(group, place, output_splits, "output");
  check_own(group, from, to, kSingle);
  if (group.size == 1) {
    call.epilogue = copy_of(input, output);
    return call;
  }
  call.body = exchange_body(std::move(from), std::move(to), message_dtype(input));
  call.epilogue = copy_back({place}, {output});
  call.landing = {dense, place};
  return call;
}

}  // namespace mnnvl::collectives
