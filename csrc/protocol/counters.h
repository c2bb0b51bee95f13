// What a transport counts of its requests, for whoever looks at a group. Relaxed: written by whoever runs the request,
// read by any thread.
#pragma once

#include <atomic>
#include <cstdint>

namespace mnnvl {

struct TransportCounters {
  using Count = std::atomic<uint64_t>;

  // All-reduces by the algorithm that took them, whether it was chosen or asked for.
  Count cpu_oneshot{0}, cpu_twoshot{0};
  Count oneshot_lamport{0}, twoshot_lamport{0};
  Count pair_channels{0};  // on a GPU, what the Lamport kernels don't add
  Count slept{0};  // collectives on the CPU that slept until a peer came
};

inline void count_one(TransportCounters::Count& count) { count.fetch_add(1, std::memory_order_relaxed); }

}  // namespace mnnvl
