// The collectives over host memory: the CPU transport, and the bit-for-bit reference of the kernels.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "cpu/group_failure.h"
#include "cpu/messenger.h"
#include "cpu/segment.h"
#include "cpu/steps.h"
#include "protocol/requests.h"

namespace mnnvl::cpu {

// One rank's part in a group. run() is collective: all ranks, same calls, same order, one thread at a time. abort() and
// check() from any thread at any time.
class Communicator {
 public:
  // Error(kInvalidArgument) for options that can't be. Not collective; every rank's segment must be there.
  explicit Communicator(const CommunicatorOptions& options);
  // Ends messages that are under way by abort(); returns when no thread of the messenger touches a segment.
  ~Communicator() { messenger_->stop(); }

  // Returns when the result is in place, or throws within `timeout_ms` (which must be positive; a very long one
  // saturates). Bad arguments, an all_reduce's kAuto among them, are Error(kInvalidArgument) before anything is shared.
  // Other failures (kTimeout, kPeerFailed, kAborted) break the group: peers are told through their abort words, and
  // every later call throws the same error at once. Ranks whose calls differ are such a failure (kPeerFailed), whose
  // text names both calls: layout.h, "Calls".
  void run(const Request& request, int64_t timeout_ms);

  // Not collective: csrc/protocol/messenger.h. It breaks the group as run() does, and is ended by what breaks it.
  Messenger& messenger() { return *messenger_; }

  void abort(FailureCause cause = FailureCause::kLocalAbort) { failure_.abort(cause); }
  // Throws the failure of this group, if it has one by now.
  void check() const { failure_.check(); }

 private:
  GroupFailure failure_;
  Steps steps_;
  const std::shared_ptr<Messenger> messenger_;
};

size_t default_segment_bytes(int world_size);

}  // namespace mnnvl::cpu
