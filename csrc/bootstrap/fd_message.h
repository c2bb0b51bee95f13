// One message with a descriptor on a unix socket: SCM_RIGHTS and what goes with it.
#pragma once

#include <string>
#include <vector>

#include "system/unique_fd.h"

namespace mnnvl {

constexpr size_t kSocketNameBytes = 32;  // hexadecimal digits of 128 bits

struct FdMessage {
  int rank = -1;
  std::string sender;  // the sender's own socket name, which only the group knows together with its rank
  bool has_fd = false;
  std::vector<UniqueFd> fds;  // as received; all are owned, also unwanted ones
  bool truncated = false;     // descriptors were lost on the way
};

// Sends a message of `rank` with `fd` (-1: none), which stays the caller's. Never blocks. False: nothing was sent, as
// the user has too many descriptors on their way; try again on a fresh connection. Throws Error: kPeerFailed when the
// connection is closed, kSystem otherwise; `peer` is for its text.
bool send_fd_message(int connection, int peer, int rank, const std::string& sender, int fd);

enum class Received { kNothingYet, kMessage, kRubbish };

// Reads one message without blocking. kRubbish: end of file, an error, or nothing of ours; what came with it is closed.
Received receive_fd_message(int connection, FdMessage* message);

}  // namespace mnnvl
