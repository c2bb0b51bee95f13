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
#include "protocol/device_ops.h"

namespace mnnvl {

enum class HandleType : int { kPosixFd = 0, kFabric = 1 };
enum class MulticastMode : int { kOff = 0, kAuto = 1 };
// How handles are exchanged. kAuto: over NCCL where they are fabric handles and every rank has NCCL and a device of its own,
// else over the given exchange: descriptors need only an address, and a first exchange over NCCL leaves some 280 MiB in the context.
enum class Bootstrap : int { kNccl = 0, kStore = 1, kAuto = 2 };

struct SymmetricBufferOptions {
  int device = 0;                // CUDA ordinal; the caller has made its primary context current
  size_t bytes = 0;              // rounded up to the granularity that the plan needs
  uint32_t fill = 0x80000000u;   // value of every 32-bit word at rest
  MulticastMode multicast = MulticastMode::kAuto;  // kAuto still obeys the environment's switches
  Bootstrap bootstrap = Bootstrap::kAuto;
  std::string host_id;           // empty: found out; tests and MNNVL_HOST_ID override it
  int timeout_ms = 0;            // deadline of each wait inside the set-up
};

class SymmetricBuffer {
 public:
  // Collective over `exchange`: capabilities, allocate, export, exchange, import and map, multicast, initialise,
  // self-test; each stage ends in an agreement (csrc/README.md lists them). Either returns on every rank or throws the
  // same Error on every rank with nothing left allocated.
  static std::unique_ptr<SymmetricBuffer> create(const CudaDriver& driver, const NcclLibrary* nccl,
                                                 const DeviceOps& ops, Exchange& exchange,
                                                 const SymmetricBufferOptions& options);
  // Not collective: peers' mappings of this rank's memory stay valid. No kernel may use the buffer any more.
  virtual ~SymmetricBuffer() = default;

  virtual size_t bytes() const = 0;
  virtual uint64_t address(int rank) const = 0;      // where rank's memory is mapped here
  virtual uint64_t multicast_address() const = 0;    // 0 without multicast
  // Why there is no multicast, naming the rank; empty with it.
  virtual const std::string& multicast_problem() const = 0;
  virtual HandleType handle_type() const = 0;
  virtual int min_multiprocessors() const = 0;       // smallest SM count of the group: launch shapes must agree
  virtual int min_compute_capability() const = 0;    // 90, 100, …
  // Process ids of peers on this host in this pid namespace, for the watchdog; -1 for others and for this process.
  virtual const std::vector<int>& peer_pids() const = 0;
};

}  // namespace mnnvl
