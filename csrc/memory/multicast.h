// One multicast object over all ranks' memory: a store through it reaches every rank.
#pragma once

#include <memory>

#include "memory/handle_exchange.h"

namespace mnnvl {

class Multicast {
 public:
  // Collective: rank 0 creates and exports, all import, then all add their device, then all bind, then all map, with
  // an agreement between each two, since the driver blocks in a bind until every device was added. Maps where it did
  // the last time. Throws the same AgreedError on every rank, and is then to be detached or destroyed. Creates nothing
  // where context.multicast_forbidden says so.
  void attach(const SetupContext& context, const Allocation& memory, size_t size, size_t alignment);
  // Not collective. Keeps the address alone; releases all else, then throws the first that failed.
  void detach();

  CUdeviceptr address() const { return range_->address(); }

 private:
  // Released from the last to the first.
  std::unique_ptr<AddressRange> range_;  // from the first attach() on
  Allocation object_;
  std::unique_ptr<MulticastBinding> binding_;
  std::unique_ptr<Mapping> mapping_;
};

// Collective: what every rank's memory must be a multiple of to be bound, the largest of all ranks' answers. Throws
// the same AgreedError on every rank.
size_t multicast_granularity(const SetupContext& context, size_t size);

}  // namespace mnnvl
