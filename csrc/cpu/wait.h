// All waiting of the CPU collectives, and all that ends it: data, deadline, dead peers, abort words. Words and orders:
// layout.h. The messages' counterpart is messenger.h; what both share is in backoff.h and group_failure.h.
#pragma once

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "common/math.h"
#include "cpu/backoff.h"
#include "cpu/group_failure.h"
#include "cpu/layout.h"
#include "protocol/counters.h"

namespace mnnvl::cpu {

enum class Word : int { kPosted = 0, kReduced = 1, kDone = 2 };

inline Signal& signal_of(Control* control, Word word) {
  switch (word) {
    case Word::kPosted: return control->posted;
    case Word::kReduced: return control->reduced;
    default: return control->done;
  }
}

// Writer's side: makes everything stored before visible to a rank that sees `epoch`, and wakes sleepers if there are
// any.
inline void publish(Signal& signal, uint32_t epoch) {
  signal.epoch.store(epoch, std::memory_order_seq_cst);
  if (signal.sleepers.load(std::memory_order_seq_cst) != 0) futex_wake_all(signal.epoch);
}

// Waits of one rank. One collective at a time, on one thread. After the group's first failure nothing more is
// published, and every begin() throws it again.
class Waiter {
 public:
  // `failure` and `slept`, which counts the collectives that had to sleep and may be null, must outlive it.
  Waiter(int rank, const std::vector<std::byte*>& segments, bool own_core, GroupFailure& failure,
         TransportCounters::Count* slept);

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

 private:
  struct Target;  // one wait
  uint32_t wait_slowly(int peer, Word word, uint32_t target);
  bool spin(const Target& target, uint32_t* seen);
  uint32_t sleep(const Target& target);
  void throw_if_told(const Target* target);
  FailureRecord record_of(FailureCause cause, int peer, const Target* target) const;
  [[noreturn]] void fail_wait(FailureCause cause, const Target& target);
  [[noreturn]] void give_up(const FailureRecord& record, const FailureDetails& details);

  using Clock = std::chrono::steady_clock;

  const int rank_;
  std::vector<Control*> controls_;
  const bool own_core_;
  GroupFailure& failure_;
  TransportCounters::Count* const slept_;

  Operation operation_ = Operation::kBarrier;
  uint64_t sequence_ = 0;
  uint64_t last_slept_ = 0;  // sequence_ of the last collective that slept
  Clock::time_point started_;
  Clock::time_point deadline_;
};

}  // namespace mnnvl::cpu
