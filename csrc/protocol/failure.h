// What a wait that ended without its data leaves behind: kernels write the record into pinned host memory, CPU ranks
// fill one where they wait (cpu/wait.cpp). protocol/failure_text.h gives it its words.
#pragma once

#include <cstdint>

#include "common/math.h"
#include "protocol/types.h"

namespace mnnvl {

enum class FailureCause : uint32_t {
  kNone = 0,
  kDeadline = 1,    // nobody is known to be dead; the peer did not come in time
  kPeerDied = 2,    // the peer's process has ended
  kPeerFailed = 3,  // another rank stopped first and told us: `told`
  kLocalAbort = 4,  // abort() on this rank
  kMismatch = 5,    // the peer came with another call
  kLocalError = 6,  // this rank failed in a call of its own, or on its other device type
  kConcurrent = 7,  // two kernels of this rank at once where one may be, which only a captured graph can bring about
};

// Two calls that differ, or the two ends of a message: pack()ed CallDescriptors and their tags.
struct RecordedCalls {
  uint64_t mine, theirs;
  int32_t my_tag, their_tag;
};

struct FailureRecord {
  uint32_t valid;     // written last (release), 1 when the rest can be read
  FailureCause cause;
  int32_t rank;       // who waited
  int32_t peer;       // for whom; -1: for any; for kPeerFailed, where it began: abort_rank() of what was told
  Operation operation;
  uint32_t stage;     // GPU: one of the stages below. The CPU names the word instead
  uint64_t sequence;  // collective number in the group, counted where the wait ran; of a channel: its message number
  uint64_t expected;  // pack index, or count of messages or slots, waited for
  uint64_t seen;      // what stood there
  uint32_t told;      // kPeerFailed: the abort word that ended the wait; 0 if it wasn't kept
  RecordedCalls calls;  // kMismatch on a GPU
};

// What a kernel waited for.
constexpr uint32_t kStageScatter = 0;    // Lamport: contributions
constexpr uint32_t kStageBroadcast = 1;  // Lamport: sums of their owners
constexpr uint32_t kStageMessage = 2;    // channels: what the source posts
constexpr uint32_t kStageCredit = 3;     // channels: room at the destination

// An abort word is 0 at rest, else it says where the failure began and, where its writer knows, how:
//
//   bits 0-7   the rank where it began: the one that is dead, late, in another call, or was told to abort()
//   bit  8     kAbortFlag
//   bits 9-11  FailureCause of whoever found it, kNone if that isn't told
//   bits 16-23 who found it: the rank that waited
//
// The first word stays, and whoever is told passes the word on as it is.
constexpr uint32_t kAbortFlag = 0x100u;
MNNVL_HOST_DEVICE constexpr uint32_t abort_word(int root_rank, FailureCause cause = FailureCause::kNone,
                                                int finder = 0) {
  return kAbortFlag | static_cast<uint32_t>(root_rank) | static_cast<uint32_t>(cause) << 9 |
         static_cast<uint32_t>(finder) << 16;
}
MNNVL_HOST_DEVICE constexpr int abort_rank(uint32_t word) { return static_cast<int>(word & 0xffu); }
MNNVL_HOST_DEVICE constexpr FailureCause abort_cause(uint32_t word) {
  return static_cast<FailureCause>(word >> 9 & 0x7u);
}
MNNVL_HOST_DEVICE constexpr int abort_finder(uint32_t word) { return static_cast<int>(word >> 16 & 0xffu); }

}  // namespace mnnvl
