// Why a group is broken, and what can break it: the part that a rank's collectives and its messages have in common, so
// that they break together.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <vector>

#include "common/error.h"
#include "common/first_failure.h"
#include "cpu/layout.h"
#include "protocol/failure_text.h"
#include "system/peer_watch.h"

namespace mnnvl::cpu {

// Any thread. After the first failure the group is broken: peers have been told, and everything that is under way or
// comes later on this rank ends with that failure.
class GroupFailure {
 public:
  GroupFailure(int rank, const std::vector<std::byte*>& segments, const std::vector<int>& peer_pids);

  // Whether abort() here or a peer's word ends what is under way; then `record` has its cause, peer and told.
  bool told(FailureRecord* record) const {
    const FailureCause aborted = aborted_.load(std::memory_order_relaxed);
    const uint32_t word = controls_[rank_]->abort.load(std::memory_order_acquire);
    if (aborted == FailureCause::kNone && word == 0) return false;
    describe(aborted, word, record);
    return true;
  }
  // Makes the group fail of this record, which waited for so long, tells the peers, and gives the error to end with:
  // this one, or what the group had failed of before.
  Error end(const FailureRecord& record, double waited_seconds, const FailureDetails& details);
  // The same for what isn't a wait: `error`, of this rank's own making.
  Error end(const Error& error);

  void abort(FailureCause cause);
  bool failed() const { return first_.failed(); }
  Error error() const { return first_.get(); }  // of a group that has failed
  // Throws what made the group broken, if it is.
  void check() const { first_.check(); }

  // A system call or two.
  bool peer_ended(int peer);
  int peer_pid(int peer) const { return peers_[peer].pid(); }

 private:
  void describe(FailureCause aborted, uint32_t word, FailureRecord* record) const;
  Error remember(const Error& error, uint32_t word);
  void tell_peers(uint32_t word);

  const int rank_;
  std::vector<Control*> controls_;
  std::mutex peers_mutex_;  // of what peers_ remember
  std::vector<PeerWatch> peers_;
  std::atomic<FailureCause> aborted_{FailureCause::kNone};
  FirstFailure first_;
};

}  // namespace mnnvl::cpu
