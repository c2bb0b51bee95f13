// One thread per GPU transport: notices peers on this host whose process has ended, and failures that kernels recorded.
#pragma once

#include <atomic>
#include <functional>
#include <thread>
#include <vector>

#include "protocol/workspace.h"

namespace mnnvl {

class Watchdog {
 public:
  // `peer_pids` by rank, -1 for those not watched. Sets the dead rank's bit in `mailbox`, which ends waits for that rank;
  // calls `on_failure` once, from its own thread, when a kernel has recorded a failure.
  Watchdog(HostMailbox* mailbox, const std::vector<int>& peer_pids, std::function<void()> on_failure);
  ~Watchdog();
  Watchdog(const Watchdog&) = delete;
  Watchdog& operator=(const Watchdog&) = delete;

  // Lowest rank known to be dead, or -1.
  int dead_rank() const { return dead_rank_.load(std::memory_order_acquire); }

 private:
  struct Peer {
    int rank;
    int pidfd;
  };
  void run();
  void mark_dead(int rank);

  HostMailbox* mailbox_;
  std::function<void()> on_failure_;
  std::vector<Peer> peers_;
  std::atomic<int> dead_rank_{-1};
  int stop_fd_;
  std::thread thread_;
};

}  // namespace mnnvl
