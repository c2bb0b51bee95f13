// The words of every failure of a collective, GPU and CPU: the one place where a FailureRecord becomes a sentence.
#pragma once

#include <string>

#include "common/error.h"
#include "protocol/failure.h"
#include "protocol/requests.h"

namespace mnnvl {

const char* name(Dtype dtype);  // "float32"
const char* name(ReduceOp op);  // "sum"

// "all_reduce of 192 bytes float32 sum (two-shot)", "broadcast of 16 bytes from root 0", "barrier".
std::string describe(const CallDescriptor& call);

// How two ranks' calls, or both ends of a message, differ; the ranks are those of the record.
struct Mismatch {
  enum class Kind {
    kCalls,    // both are in the same step, of different calls
    kWentOn,   // the peer has passed the step in a call in which it has no data to give, and is now in `theirs`
    kPassed,   // the same, and `theirs` isn't known
    kEarlier,  // the calls are alike, but some before them were not, which could not be seen while they ran
    kPair,     // the calls are alike, but the peer sends `theirs.bytes`, where this rank expects `mine.bytes` of it
    kMessage,  // the peer sent `theirs`, where this rank received `mine`
  };
  Kind kind;
  CallDescriptor mine;
  CallDescriptor theirs;
};

// What one side knows beyond the record; every part may be left out.
struct FailureDetails {
  const char* word = nullptr;  // CPU: the shared word waited on ("posted"), or "bytes", in place of the record's stage
  int peer_pid = -1;  // CPU: of the peer that has ended
  bool waiting = true;  // false: the call found the group broken before it waited for anything
  const Mismatch* mismatch = nullptr;  // with kMismatch
};

// The record as an Error: kTimeout (kDeadline), kPeerFailed (kPeerDied, kPeerFailed, kMismatch) or kAborted
// (kLocalAbort). Every text says who waited for whom, in which call, for how long, and where the failure began:
//
//   mnnvl: rank 0 waited 2 s for rank 1 in all_reduce (call 17, stage 0: expected 40, seen 39): the timeout passed
//   mnnvl: rank 2 stopped in broadcast (call 17) because the failure began at rank 1: rank 0 waited for it until the
//   timeout
//   mnnvl: rank 0 waited 2 s for rank 1 in recv (call 3, bytes: expected 100, seen 0): the timeout passed
//   mnnvl: rank 0 received another message than it asked for in recv (call 3): rank 1 sent a message of 192 bytes
//   float32 with tag 3, rank 0 expected one of 100 bytes float32 with tag 3. ...
//   mnnvl: rank 1 came with another call than rank 0 in all_reduce (call 17, posted: expected 40, seen 40): rank 0 is
//   in all_reduce of 192 bytes float32 sum (one-shot), rank 1 in broadcast of 16 bytes from root 0. ...
//
// `waited_seconds` is how long the call had run, or its timeout where only that is known.
Error to_error(const FailureRecord& record, double waited_seconds, const FailureDetails& details = {});

}  // namespace mnnvl
