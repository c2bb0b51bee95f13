// An Exchange between threads of one process, for tests and demonstrations.
#pragma once

#include <memory>
#include <vector>

#include "bootstrap/exchange.h"

namespace mnnvl {

// One Exchange per rank, each to be used by one thread. all_gather ends after `timeout_ms` with Error(kTimeout)
// naming the ranks that did not come, on every waiting rank; after that the group is broken and every later call
// fails at once.
std::vector<std::unique_ptr<Exchange>> make_thread_exchanges(int world_size, int timeout_ms);

}  // namespace mnnvl
