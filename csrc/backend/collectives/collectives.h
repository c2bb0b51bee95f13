// The operations: each checks the arguments of its virtual of c10d::Backend and makes the Call. One file an
// operation, one
// row here. They throw ValueError, TypeError or RuntimeError that names operation and argument; then nothing has
// happened.
#pragma once

#include <vector>

#include "backend/call.h"

namespace mnnvl::collectives {

using Tensors = std::vector<at::Tensor>;

Call all_reduce(GroupView group, Tensors& tensors, const c10d::AllreduceOptions& options);
Call all_reduce_coalesced(GroupView group, Tensors& tensors, const c10d::AllreduceCoalescedOptions& options);

Call all_gather(GroupView group, std::vector<Tensors>& outputs, Tensors& inputs, const c10d::AllgatherOptions& options);
Call all_gather_into_tensor(GroupView group, at::Tensor& output, at::Tensor& input,
                            const c10d::AllgatherOptions& options);
Call all_gather_into_tensor_coalesced(GroupView group, Tensors& outputs, Tensors& inputs,
                                      const c10d::AllgatherOptions& options);

Call broadcast(GroupView group, Tensors& tensors, const c10d::BroadcastOptions& options);

// `bound`: the group's GPU, where one is known.
Call barrier(GroupView group, std::optional<at::Device> bound, const c10d::BarrierOptions& options);

Call send(GroupView group, Tensors& tensors, int destination, int tag);
Call recv(GroupView group, Tensors& tensors, int source, int tag);
Call recv_any_source(GroupView group, Tensors& tensors, int tag);

// What is not served yet. RuntimeError with the public name and the way out.
[[noreturn]] void refuse(const char* name);

}  // namespace mnnvl::collectives
