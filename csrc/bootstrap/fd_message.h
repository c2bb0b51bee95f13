// One message with a descriptor on a unix socket: SCM_RIGHTS and what goes with it.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "system/unique_fd.h"

namespace mnnvl {

constexpr size_t kTokenBytes = 32;  // hexadecimal digits of 128 bits

struct FdMessage {
  int rank = -1;
  bool has_fd = false;
  std::vector<UniqueFd> fds;  // as received; all are owned, also unwanted ones
  bool truncated = false;     // descriptors were lost on the way
};

// Sends a message of `rank` with its token, which only the group knows, and `fd` (-1: none), which stays the caller's.
// Never blocks. False: nothing was sent, as the user has too many descriptors on their way, or the other end has
// dropped the connection; try again on a fresh one. Throws Error(kSystem) otherwise; `peer` is for its text.
bool send_fd_message(int connection, int peer, int rank, const std::string& token, int fd);

enum class Received { kNothingYet, kMessage, kRubbish };

// Reads one message without blocking, if `expected(rank, token)`. It is looked at first without its descriptors, so
// those that a stranger sends never come into this process: the kernel closes them with the connection. kRubbish: end
// of file, an error, or nothing that is expected.
using Expected = std::function<bool(int rank, const std::string& token)>;
Received receive_fd_message(int connection, const Expected& expected, FdMessage* message);

}  // namespace mnnvl
