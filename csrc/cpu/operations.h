// The collectives of the CPU, one function each, in a file of its name (reduce: reduce_to_root.cpp). They check their
// arguments (Error kInvalidArgument, the group stays usable), begin the call, and return when the result is in place;
// failures as in communicator.h. A new operation is a request, an overload here and its file.
#pragma once

#include <cstdint>

#include "cpu/steps.h"
#include "protocol/requests.h"

namespace mnnvl::cpu {

// The strategy must be a concrete one, the same on every rank: which is best is not this layer's to know.
void run(Steps& steps, const AllReduceRequest& request, int64_t timeout_ms);
void run(Steps& steps, const ReduceScatterRequest& request, int64_t timeout_ms);
void run(Steps& steps, const ReduceRequest& request, int64_t timeout_ms);
void run(Steps& steps, const AllGatherRequest& request, int64_t timeout_ms);
void run(Steps& steps, const BroadcastRequest& request, int64_t timeout_ms);
void run(Steps& steps, const ScatterRequest& request, int64_t timeout_ms);
void run(Steps& steps, const GatherRequest& request, int64_t timeout_ms);
void run(Steps& steps, const AllToAllRequest& request, int64_t timeout_ms);
void run(Steps& steps, const BarrierRequest& request, int64_t timeout_ms);
void run(Steps& steps, const FusedRequest& request, int64_t timeout_ms);

// An all_reduce, as a part of what `call` describes.
void all_reduce(Steps& steps, const AllReduceRequest& request, const CallDescriptor& call, int64_t timeout_ms);

}  // namespace mnnvl::cpu
