// All waiting of the CPU transport, and all that ends it: data, deadline, dead peers, abort words. Words and orders:
// layout.h.
#pragma once

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <optional>
#include <vector>

#include "common/error.h"
#include "common/math.h"
#include "cpu/layout.h"
#include "protocol/failure_text.h"
#include "system/peer_watch.h"

namespace mnnvl::cpu {

constexpr int kMaxSleepMs = 20;

enum class Word : int { kPosted = 0, kReduced = 1, kDone = 2 };

inline Signal& signal_of(Control* control, Word word) {
  switch (word) {
    case Word::kPosted: return control->posted;
    case Word::kReduced: return control->reduced;
    default: return control->done;
  }
}

void futex_wake_all(std::atomic<uint32_t>& word);

// Writer's side: makes everything stored before visible to a rank that sees `epoch`, and wakes sleepers if there are
// any.
inline void publish(Signal& signal, uint32_t epoch) {
  signal.epoch.store(epoch, std::memory_order_seq_cst);
  if (signal.sleepers.load(std::memory_order_seq_cst) != 0) futex_wake_all(signal.epoch);
}

// Waits of one rank. One collective at a time, on one thread; abort() and check() from any thread. After the first
// failure the group is broken: peers have been told, nothing more is published, and every begin() throws again.
class Waiter {
 public:
  Waiter(int rank, const std::vector<std::byte*>& segments, const std::vector<int>& peer_pids);

  // Starts a collective: its deadline runs from here. Throws if the group is broken, here or by a peer's word.
  void begin(Operation operation, int64_t timeout_ms);

  // Returns when `peer`'s word has reached `target`, with acquire order, and gives the epoch seen; else throws Error
  // (kTimeout, kPeerFailed, kAborted) after the failure has been recorded and told to all peers.
  uint32_t wait(int peer, Word word, uint32_t target) {
    const uint32_t seen = signal_of(controls_[peer], word).epoch.load(std::memory_order_acquire);
    return reached(seen, target) ? seen : wait_slowly(peer, word, target);
  }

  // Breaks the group: `peer`'s post of step `expected` belongs to another call. `seen`: its posted epoch.
  [[noreturn]] void fail_mismatch(int peer, uint32_t expected, uint32_t seen, const Mismatch& mismatch);

  void abort(FailureCause cause);
  // Throws what made the group broken, if it is.
  void check() const;

 private:
  struct Target;  // one wait
  uint32_t wait_slowly(int peer, Word word, uint32_t target);
  bool spin(const Target& target, uint32_t* seen);
  uint32_t sleep(const Target& target);
  void throw_if_told(const Target* target);
  FailureRecord record_of(FailureCause cause, int peer, const Target* target) const;
  [[noreturn]] void fail_wait(FailureCause cause, const Target& target);
  [[noreturn]] void give_up(const FailureRecord& record, const FailureDetails& details);
  void tell_peers(uint32_t word);

  using Clock = std::chrono::steady_clock;

  const int rank_;
  std::vector<Control*> controls_;
  std::vector<PeerWatch> peers_;
  bool own_core_ = false;  // every rank of this host can have a core to itself

  Operation operation_ = Operation::kBarrier;
  uint64_t sequence_ = 0;
  Clock::time_point started_;
  Clock::time_point deadline_;

  std::atomic<FailureCause> aborted_{FailureCause::kNone};
  mutable std::mutex mutex_;  // of error_
  std::optional<Error> error_;
  std::atomic<bool> broken_{false};
};

}  // namespace mnnvl::cpu
