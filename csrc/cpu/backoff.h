// How a thread of the CPU transport waits for what a peer does: it looks, yields, then sleeps on a futex. The one place
// with the numbers.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <vector>

namespace mnnvl::cpu {

// Longest sleep at a time: abort words and dead peers change no word that is slept on.
constexpr int kMaxSleepMs = 20;

// Every rank can have a core to itself. `peer_pids` as in CommunicatorOptions.
bool enough_cores(const std::vector<int>& peer_pids);

// One wait's looks, until it is time to sleep.
class Backoff {
 public:
  explicit Backoff(bool own_core) : own_core_(own_core) {}
  // Between two looks. False when the time for looking is over.
  bool pause();

 private:
  bool own_core_;
  int look_ = 0;
  std::chrono::steady_clock::time_point start_{};
};

// At most so long, and only while the word is `seen`; may return early for no reason.
void futex_wait(std::atomic<uint32_t>& word, uint32_t seen, std::chrono::nanoseconds at_most);
void futex_wake_all(std::atomic<uint32_t>& word);

}  // namespace mnnvl::cpu
