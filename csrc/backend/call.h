// One call of c10d, checked and ready to run. A collective (backend/collectives/) builds it by free functions that
// look at the arguments and change nothing; ProcessGroupMNNVL::run orders it, watches it, and returns its Work.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/distributed/c10d/Types.hpp>
#include <torch/csrc/distributed/c10d/Work.hpp>

#include <chrono>
#include <cstdint>
#include <functional>
#include <vector>

#include "transport/transport.h"

namespace mnnvl {

// The communication of a call. What it throws other than the group's failure breaks the group: a part of it may have
// run, so this rank can't be paired with its peers again.
using Body = std::function<void(Transport&, const Run&)>;

// ATen calls of a call: at its end, on its stream, without autograd. A failure is this call's alone.
using Local = std::function<void()>;

struct Call {
  c10d::OpType type = c10d::OpType::UNKNOWN;
  const char* title = nullptr;  // "mnnvl:all_reduce": the profiler's name of it
  const char* name = nullptr;  // "all_reduce": the public name, of errors
  at::Device device = at::kCPU;
  bool async = false;
  uint64_t sequence = 0;  // of the group's collectives; of messages, that of the collective before
  std::chrono::milliseconds timeout = c10d::kUnsetTimeout;  // the call's own; unset: the group's
  std::vector<at::Tensor> inputs;  // kept alive, and shown to the profiler
  std::vector<at::Tensor> outputs;  // kept alive, and Work::result()
  std::vector<at::Tensor> landing;  // kept alive
  int root = -1;  // for the profiler, like the next two; -1: none
  std::vector<int64_t> input_splits, output_splits;
  Body body;  // empty: nothing to send, as with one rank or no elements
  std::vector<Message> sends, receives;  // point-to-point: these instead of a body, beside the group's collectives
  Local epilogue;  // may be empty

  bool has_messages() const { return !sends.empty() || !receives.empty(); }
  ExchangeRequest messages() const { return {sends.data(), int(sends.size()), receives.data(), int(receives.size())}; }
};

// The group as the collectives see it.
struct GroupView {
  int rank;
  int size;
  bool coalescing = false;  // the call is one of a group of calls
};

// "all_reduce", of "mnnvl:all_reduce".
inline const char* public_name(const char* title) { return title + sizeof("mnnvl:") - 1; }

// What every Call takes from its options, whichever operation's they are.
template <typename Options>
Call make_call(c10d::OpType type, const char* title, at::Device device, const Options& options) {
  Call call;
  call.type = type;
  call.title = title;
  call.name = public_name(title);
  call.device = device;
  call.async = options.asyncOp;
  call.timeout = options.timeout;
  return call;
}

// Several calls on one device as one: their communications in turn, then what each has left to do. `whole` brings the
// type, the names and the options.
Call merged(Call whole, std::vector<Call> parts);

// Outputs are written below autograd, like everything that a kernel writes: no graph, no in-place checks, on leaves and
// inference tensors too.
inline void run_below_autograd(const Local& local) {
  const at::AutoDispatchBelowADInplaceOrView below;
  local();
}

}  // namespace mnnvl
