// The operations: each checks the arguments of its virtual of c10d::Backend and makes the Call. One file an operation,
// one row here. They throw ValueError, TypeError or RuntimeError that names operation and argument; then nothing has
// happened.
#pragma once

#include <vector>

#include "backend/call.h"
#include "backend/tensors.h"

namespace mnnvl::collectives {

Call all_reduce(GroupView group, Tensors& tensors, const c10d::AllreduceOptions& options);
Call all_reduce_coalesced(GroupView group, Tensors& tensors, const c10d::AllreduceCoalescedOptions& options);

Call reduce(GroupView group, Tensors& tensors, const c10d::ReduceOptions& options);

Call reduce_scatter(GroupView group, Tensors& outputs, std::vector<Tensors>& inputs,
                    const c10d::ReduceScatterOptions& options);
Call reduce_scatter_tensor(GroupView group, at::Tensor& output, at::Tensor& input,
                           const c10d::ReduceScatterOptions& options);
Call reduce_scatter_tensor_coalesced(GroupView group, Tensors& outputs, Tensors& inputs,
                                     const c10d::ReduceScatterOptions& options);

Call all_gather(GroupView group, std::vector<Tensors>& outputs, Tensors& inputs, const c10d::AllgatherOptions& options);
Call all_gather_coalesced(GroupView group, std::vector<Tensors>& outputs, Tensors& inputs,
                          const c10d::AllgatherOptions& options);
Call all_gather_into_tensor(GroupView group, at::Tensor& output, at::Tensor& input,
                            const c10d::AllgatherOptions& options);
Call all_gather_into_tensor_coalesced(GroupView group, Tensors& outputs, Tensors& inputs,
                                      const c10d::AllgatherOptions& options);

Call broadcast(GroupView group, Tensors& tensors, const c10d::BroadcastOptions& options);
Call scatter(GroupView group, Tensors& outputs, std::vector<Tensors>& inputs, const c10d::ScatterOptions& options);
Call gather(GroupView group, std::vector<Tensors>& outputs, Tensors& inputs, const c10d::GatherOptions& options);

Call all_to_all(GroupView group, Tensors& outputs, Tensors& inputs, const c10d::AllToAllOptions& options);
Call all_to_all_single(GroupView group, at::Tensor& output, at::Tensor& input, std::vector<int64_t>& output_splits,
                       std::vector<int64_t>& input_splits, const c10d::AllToAllOptions& options);

// `bound`: the group's GPU, where one is known.
Call barrier(GroupView group, std::optional<at::Device> bound, const c10d::BarrierOptions& options);

Call send(GroupView group, Tensors& tensors, int destination, int tag);
Call recv(GroupView group, Tensors& tensors, int source, int tag);
Call recv_any_source(GroupView group, Tensors& tensors, int tag);

}  // namespace mnnvl::collectives
