// From a request to kernels: one function an operation.
#pragma once

#include "protocol/counters.h"
#include "protocol/requests.h"
#include "protocol/workspace.h"
#include "tuning/choose.h"

namespace mnnvl {

// What the launches of one transport share.
struct LaunchContext {
  DeviceGroup group;  // its timeout_ns is of this request
  GroupShape shape;
  Strategy strategy = Strategy::kAuto;  // for requests that ask for kAuto
  bool pdl = false;    // launch so whether a request asks for it or not
  int lamport_blocks =
      0;  // most blocks of a float sum, but for fused ones; 0: as `shape` says; may differ between ranks
  void* stream = nullptr;
  TransportCounters* counters = nullptr;  // may stay null
};

// Enqueues on the context's stream. Error(kSystem) if a launch is refused.
void launch(const LaunchContext& context, const Request& request);
void launch_fused(const LaunchContext& context, const FusedRequest& request);
// Of a group of one, whose device is current and has the kernels loaded.
void launch_alone(const FusedRequest& request, void* stream);
// Error(kInvalidArgument) for a list that no launch can carry; then nothing was enqueued.
void launch(const LaunchContext& context, const ExchangeRequest& request);

}  // namespace mnnvl
