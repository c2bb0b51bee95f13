// Passes file descriptors between the processes (or threads) of one host: SCM_RIGHTS over private abstract unix
// sockets.
#pragma once

#include <string>
#include <vector>

#include "system/unique_fd.h"

namespace mnnvl {

class FdChannel {
 public:
  // Opens a listening socket under a random 128-bit name, so that it exists before anybody learns the name. Throws
  // Error(kSystem). Not collective.
  FdChannel();

  // For the group alone: the name for the peers to connect to, and a token, of 128 bits too, that tells this rank's
  // messages from anybody else's. The name is abstract, so nothing is left in a file system. It is visible only in this
  // network namespace, where it is so to everybody: ranks in another can't connect.
  const std::string& address() const { return address_; }

  // Collective over the ranks whose addresses are given (addresses[rank] is this one's); call it once. Sends `fd`
  // (-1: none) to every peer and returns theirs by rank, an empty one for itself and for a peer that sent none. `fd`
  // stays the caller's. Connections are accepted from, and made to, the own effective uid only, and of those nothing is
  // taken that lacks the token of one of these ranks; others are dropped, and however many keep coming, silent or not,
  // they only cost time.
  // Throws Error: kPeerFailed as soon as a peer is seen to have closed its socket early, kTimeout naming the missing
  // ranks after `timeout_ms`, kSystem otherwise. All sockets are closed on every path; call it inside agree().
  std::vector<UniqueFd> exchange(int rank, const std::vector<std::string>& addresses, int fd, int64_t timeout_ms);

 private:
  UniqueFd listener_;
  std::string address_;
};

}  // namespace mnnvl
