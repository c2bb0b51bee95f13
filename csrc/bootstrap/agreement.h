// One rank's failure becomes everyone's: each set-up stage ends in an agreement, so that no rank goes on to wait for
// one that has already failed, and all raise the same root cause.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "bootstrap/exchange.h"
#include "common/error.h"

namespace mnnvl {

// What agree() throws: every rank of the group throws the same one, so a rank that catches it may take another path,
// knowing that all ranks do. Errors of the exchange itself are plain Errors and may differ between ranks.
class AgreedError : public Error {
 public:
  using Error::Error;
};

// Collective. Runs `local` (which must not itself wait for a peer longer than its own deadline), then exchanges its
// outcome. Returns when every rank succeeded; otherwise throws on every rank the same AgreedError: the failure of the
// lowest failing rank, with its kind, and a text of the form "<stage> failed on rank 2 (<where>): <reason>". A rank
// that failed by itself comes before ranks that only noticed a peer's silence (kTimeout, kPeerFailed).
// `where` describes this rank (host and device) and is used only if this rank fails.
void agree(Exchange& exchange, const std::string& stage, const std::string& where, const std::function<void()>& local);

// As agree(), and each rank's `local` returns bytes: gives all ranks' bytes, by rank.
std::vector<std::string> agree_gather(Exchange& exchange, const std::string& stage, const std::string& where,
                                      const std::function<std::string()>& local);

}  // namespace mnnvl
