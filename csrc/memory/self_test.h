// Stage 7 of a set-up: proof that every mapping leads where it should.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "memory/handle_exchange.h"
#include "memory/symmetric_buffer.h"
#include "protocol/types.h"

namespace mnnvl {

struct SelfTest {
  const SetupContext& context;
  const DeviceOps& ops;
  std::vector<CUdeviceptr> addresses;  // by rank
  std::vector<std::string> wheres;     // by rank
  size_t size;                         // of each mapping, in bytes
  uint32_t fill;

  // All collective; each throws the same AgreedError on every rank.

  // Sets every word of this rank's buffer to the value at rest.
  void fill_own(const std::string& stage) const;
  // Stores a pattern that names writer and reader through every mapping, near its start and its end; the readers
  // verify. The error names the pair. Leaves the patterns in place.
  void check_peers() const;
  // The same through the multicast mapping.
  void check_multicast(CUdeviceptr address) const;
};

}  // namespace mnnvl
