// One sleep of a symmetric buffer over simulated drivers: detach(), a look at what is held, attach().
#pragma once

#include <cstdint>
#include <map>
#include <string>

#include "memory/symmetric_buffer.h"
#include "native/fake_world.h"

namespace mnnvl {

// What one rank saw, of all its sleeps.
struct FakeSleep {
  bool addresses_kept = true;
  std::string error;  // of the first that failed
  std::map<std::string, int64_t> held;  // World::leaks() while all are detached
};

// Collective. A step that fails is made once more; what then fails is thrown.
void sleep_and_wake(SymmetricBuffer& buffer, const fake::World& world, Exchange& exchange, FakeSleep* seen);

}  // namespace mnnvl
