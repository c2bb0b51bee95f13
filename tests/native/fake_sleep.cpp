#include "native/fake_sleep.h"

#include <functional>
#include <vector>

#include "common/error.h"

namespace mnnvl {
namespace {

std::vector<uint64_t> addresses_of(const SymmetricBuffer& buffer, int size) {
  std::vector<uint64_t> all{buffer.multicast_address()};
  for (int rank = 0; rank < size; ++rank) all.push_back(buffer.address(rank));
  return all;
}

// Whether it had to be tried again.
bool tried_again(const std::function<void()>& step, FakeSleep* seen) {
  try {
    step();
    return false;
  } catch (const Error& error) {
    if (seen->error.empty()) seen->error = error.what();
  }
  return true;
}

}  // namespace

void sleep_and_wake(SymmetricBuffer& buffer, const fake::World& world, Exchange& exchange, FakeSleep* seen) {
  const std::vector<uint64_t> before = addresses_of(buffer, exchange.size());
  // It is detached then, whatever was thrown.
  (void)tried_again([&] { buffer.detach(exchange); }, seen);
  exchange.barrier();
  seen->held = world.leaks();
  exchange.barrier();
  if (tried_again([&] { buffer.attach(exchange); }, seen)) {
    exchange.barrier();
    seen->held = world.leaks();
    exchange.barrier();
    buffer.attach(exchange);
  }
  seen->addresses_kept = seen->addresses_kept && addresses_of(buffer, exchange.size()) == before;
}

}  // namespace mnnvl
