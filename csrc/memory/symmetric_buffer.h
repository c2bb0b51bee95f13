// Peer-mapped device memory: one allocation of equal size on every rank, each rank's mapped on all.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "bootstrap/exchange.h"
#include "driver/cuda_driver.h"
#include "driver/nccl.h"
#include "memory/options.h"
#include "protocol/device_ops.h"

namespace mnnvl {

// Memory and addresses come apart: detach() gives the memory back, attach() makes new memory at the same addresses, for
// launches that were captured with them.
class SymmetricBuffer {
 public:
  // Collective over `exchange`: capabilities, allocate, export, exchange, import and map, multicast, initialise,
  // self-test; each stage ends in an agreement (csrc/README.md lists them). Either returns on every rank or throws the
  // same Error on every rank with nothing left allocated. Driver, `nccl` and `ops` outlive the buffer.
  static std::unique_ptr<SymmetricBuffer> create(const CudaDriver& driver, const NcclLibrary* nccl,
                                                 const DeviceOps& ops, Exchange& exchange,
                                                 const SymmetricBufferOptions& options);
  // Not collective: peers' mappings of this rank's memory stay valid. No kernel may use the buffer any more.
  virtual ~SymmetricBuffer() = default;

  // Collective; no kernel of any rank may use the buffer any more. On return no rank holds memory of any rank; all of
  // them hold their addresses. Detached whether it returns or throws: the same Error on every rank, if some driver
  // couldn't release something.
  virtual void detach(Exchange& exchange) = 0;
  // Collective, of a detached buffer: the stages of create() from the allocation on, at the old addresses, and with
  // multicast if there was multicast before: captured launches know no other way. Attached and at rest on return; if it
  // throws, still detached, on every rank, and may be tried again.
  virtual void attach(Exchange& exchange) = 0;
  // Not collective: detaches after a failure, when the ranks can't be counted on to meet again. Peers' mappings keep
  // this rank's memory until they do the same.
  virtual void drop() noexcept = 0;

  virtual size_t bytes() const = 0;  // of this rank's memory
  virtual uint64_t address(int rank) const = 0;      // where rank's memory is mapped here
  virtual uint64_t multicast_address() const = 0;    // 0 without multicast
  // Why there is no multicast, naming the rank; empty with it.
  virtual const std::string& multicast_problem() const = 0;
  virtual HandleType handle_type() const = 0;
  virtual int min_multiprocessors() const = 0;       // smallest SM count of the group: launch shapes must agree
  // Process ids of peers on this host in this pid namespace, for the watchdog; -1 for others and for this process.
  virtual const std::vector<int>& peer_pids() const = 0;
};

}  // namespace mnnvl
