#include "backend/comms_record.h"

#include <torch/csrc/distributed/c10d/ParamCommsUtils.hpp>

#include <cstring>
#include <string>
#include <tuple>

// Older torch doesn't ask whether the caller waits.
#ifndef RECORD_PARAM_COMMS_DATA_WITH_ASYNC_OP
#define RECORD_PARAM_COMMS_DATA_WITH_ASYNC_OP(a, b, c, d, e, f, g, h, i, j, k, l, m, n, async) \
  RECORD_PARAM_COMMS_DATA(a, b, c, d, e, f, g, h, i, j, k, l, m, n)
#endif

namespace mnnvl {
namespace {

// The words of NCCL's process group, which tools look for, where they aren't those of its events.
const char* record_name(const Call& call) {
  static constexpr const char* kNames[][2] = {
      {"all_reduce", "allreduce"},
      {"all_reduce_coalesced", "allreduce_coalesced"},
      {"_all_gather_base", "_allgather_base"},
      {"all_gather_into_tensor_coalesced", "allgather_into_tensor_coalesced"},
      {"all_to_all_single", "all_to_allv"},
  };
  const char* name = public_name(call.title);
  for (const auto& [own, theirs] : kNames) {
    if (std::strcmp(name, own) == 0) return theirs;
  }
  return name;
}

int64_t numel_of(const std::vector<at::Tensor>& tensors) {
  int64_t numel = 0;
  for (const at::Tensor& tensor : tensors) numel += tensor.numel();
  return numel;
}

// The root, the other end of a message, else this rank.
int told_rank(const Call& call, int rank) {
  if (call.has_messages()) return (call.sends.empty() ? call.receives : call.sends)[0].peer;
  return call.root < 0 ? rank : call.root;
}

// The group's ranks as their first and the step from one to the next; -1: they have none. Of all ranks of the program
// the list is empty.
std::tuple<int, int> range_of(const std::vector<uint64_t>& ranks) {
  if (ranks.empty()) return {0, 1};
  if (ranks.size() == 1) return {int(ranks[0]), 0};
  const uint64_t stride = ranks[1] - ranks[0];
  for (size_t i = 2; i < ranks.size(); ++i) {
    if (ranks[i] - ranks[i - 1] != stride) return {int(ranks[0]), -1};
  }
  return {int(ranks[0]), int(stride)};
}

}  // namespace

void record_comms(const Call& call, const c10d::Backend& group, const std::vector<uint64_t>& global_ranks,
                  uint64_t sequence, const std::function<void()>& begin) {
  const auto [first, stride] = range_of(global_ranks);
  const std::vector<at::Tensor>& some = call.inputs.empty() ? call.outputs : call.inputs;
  const at::ScalarType dtype = some.empty() ? at::kByte : some[0].scalar_type();
  RECORD_PARAM_COMMS_DATA_WITH_ASYNC_OP(std::make_tuple(int64_t(sequence), call.has_messages()),
                                        std::make_tuple(group.getGroupUid(), group.getGroupDesc()), call.inputs,
                                        call.outputs, told_rank(call, group.getRank()), record_name(call),
                                        numel_of(call.inputs), numel_of(call.outputs), dtype, call.input_splits,
                                        call.output_splits, first, stride, group.getSize(), call.async);
  begin();
}

}  // namespace mnnvl
