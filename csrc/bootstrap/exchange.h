// The control plane of a group's set-up: an all-gather of bytes. Implementations: c10d store (backend/), NCCL
// (bootstrap/nccl_exchange.h), a caller's Python communicator (bindings.cpp), threads in one process (tests).
#pragma once

#include <string>
#include <vector>

namespace mnnvl {

class Exchange {
 public:
  virtual ~Exchange() = default;
  virtual int rank() const = 0;
  virtual int size() const = 0;

  // Collective; every rank calls in the same order. Returns size() strings, [rank()] being `mine`; lengths may differ
  // between ranks. What the peers' ones hold is theirs: it is parsed (bootstrap/record.h), not believed. Ends by the
  // exchange's own deadline with Error(kTimeout) that names the ranks that did not come.
  virtual std::vector<std::string> all_gather(const std::string& mine) = 0;

  // Collective. By default an all_gather of nothing.
  virtual void barrier() { all_gather({}); }
};

}  // namespace mnnvl
