// What a rank says of itself in the store while it takes part in a set-up (backend/store_exchange.h).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "bootstrap/host_identity.h"
#include "common/error.h"

namespace mnnvl {

struct Presence {
  uint64_t count = 0;
  uint64_t nonce = 0;  // 0: not present
  ErrorKind kind = ErrorKind::kPeerFailed;
  std::string word;  // why this rank gave up, else empty
  HostIdentity process;
  std::vector<std::string> litter;  // what this rank may delete once everybody has met again

  std::string serialise() const;
  static Presence parse(const std::string& bytes, int rank);
};

}  // namespace mnnvl
