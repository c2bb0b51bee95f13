// What a wait that ended without its data leaves behind. Kernels write it into pinned host memory, and
// backend/ turns it into the text of a DistBackendError; CPU ranks make their text at once (cpu/wait.h).
#pragma once

#include <cstdint>

#include "common/math.h"
#include "protocol/types.h"

namespace mnnvl {

enum class FailureCause : uint32_t {
  kNone = 0,
  kDeadline = 1,     // nobody is known to be dead; the peer did not come in time
  kPeerDied = 2,     // the peer's process has ended
  kPeerFailed = 3,   // a peer stopped first and told us
  kLocalAbort = 4,   // abort() on this rank
};

struct FailureRecord {
  uint32_t valid;     // written last (release), 1 when the rest can be read
  FailureCause cause;
  int32_t rank;       // who waited
  int32_t peer;       // for whom; for kPeerFailed, who failed first if known, else -1
  Operation operation;
  uint32_t stage;     // 0 scatter or one-shot data, 1 broadcast
  uint64_t sequence;  // collective number in the group, counted where the wait ran
  uint64_t expected;  // epoch or pack index waited for
  uint64_t seen;      // what stood there
};

// An abort word names its author: 0 at rest, else kAbortFlag | rank whose failure started it.
constexpr uint32_t kAbortFlag = 0x100u;
MNNVL_HOST_DEVICE constexpr uint32_t abort_word(int root_rank) { return kAbortFlag | static_cast<uint32_t>(root_rank); }
MNNVL_HOST_DEVICE constexpr int abort_rank(uint32_t word) { return static_cast<int>(word & 0xffu); }

}  // namespace mnnvl
