// What a profiler learns of a call beside the event of its work: the record that NCCL's process group leaves too
// ("record_param_comms"), from which tools tell which ranks moved how much of what.
#pragma once

#include <torch/csrc/distributed/c10d/Backend.hpp>

#include <cstdint>
#include <functional>

#include "backend/call.h"

namespace mnnvl {

// Runs `begin` within the record of a call, which `begin` may consume. For when somebody looks on (at::hasCallbacks()):
// c10d's macro makes the whole record before it asks. `sequence`: the call's if it is the next to begin, which
// one of a coalesced group, or one without anything to send, isn't.
void record_comms(const Call& call, const c10d::Backend& group, const std::vector<uint64_t>& global_ranks,
                  uint64_t sequence, const std::function<void()>& begin);

}  // namespace mnnvl
