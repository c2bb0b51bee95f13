// One thread per GPU transport: notices peers on this host whose process has ended, and failures that kernels recorded.
#pragma once

#include <atomic>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#include "protocol/workspace.h"
#include "system/peer_watch.h"

namespace mnnvl {

class Watchdog {
 public:
  // `peer_pids` by rank, -1 for those not watched. Sets the dead rank's bit in `mailbox`, which ends waits for that
  // rank; calls `on_failure` once, from its own thread, when a kernel has recorded a failure.
  Watchdog(HostMailbox* mailbox, const std::vector<int>& peer_pids, std::function<void()> on_failure);
  ~Watchdog();
  Watchdog(const Watchdog&) = delete;
  Watchdog& operator=(const Watchdog&) = delete;

  // A rank known to be dead, or -1.
  int dead_rank() const { return dead_rank_.load(std::memory_order_acquire); }

 private:
  void run();
  void look();

  HostMailbox* mailbox_;
  std::function<void()> on_failure_;
  std::vector<PeerWatch> peers_;  // by rank
  std::vector<bool> dead_;
  bool reported_ = false;
  std::atomic<int> dead_rank_{-1};
  std::mutex mutex_;
  std::condition_variable stop_requested_;
  bool stop_ = false;
  std::thread thread_;
};

}  // namespace mnnvl
