// Shared host memory for the CPU transport: one memfd per rank, mapped on all ranks of one host.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

#include "bootstrap/exchange.h"
#include "memory/options.h"

namespace mnnvl {

class HostSegments {
 public:
  // Collective; stages and agreements as in SymmetricBuffer. Ranks on several hosts: Error(kUnsupported) with the
  // table of ranks and hosts, the same on every rank.
  static std::unique_ptr<HostSegments> create(Exchange& exchange, const HostSegmentsOptions& options);
  virtual ~HostSegments() = default;
  virtual size_t bytes() const = 0;
  virtual std::byte* address(int rank) const = 0;
  virtual const std::vector<int>& peer_pids() const = 0;  // as in SymmetricBuffer
};

}  // namespace mnnvl
