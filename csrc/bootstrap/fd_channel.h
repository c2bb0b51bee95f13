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

  // The name, for the peers to connect to; abstract, so nothing is left in a file system. It is visible only in this
  // network namespace: ranks in another can't connect.
  const std::string& address() const { return address_; }

  // Collective over the ranks whose addresses are given (addresses[rank] is this one's); call it once. Sends `fd`
  // (-1: none) to every peer and returns theirs by rank, an empty one for itself and for a peer that sent none. `fd`
  // stays the caller's. Connections are accepted from, and made to, the own effective uid only; others' are dropped
  // at once, and however many keep coming, they only cost time.
  // Throws Error: kPeerFailed as soon as a peer is seen to have closed its socket early, kTimeout naming the missing
  // ranks after `timeout_ms`, kSystem otherwise. All sockets are closed on every path; call it inside agree().
  std::vector<UniqueFd> exchange(int rank, const std::vector<std::string>& addresses, int fd, int64_t timeout_ms);

 private:
  UniqueFd listener_;
  std::string address_;
};

}  // namespace mnnvl
