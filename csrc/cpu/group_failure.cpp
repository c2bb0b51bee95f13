#include "cpu/group_failure.h"

#include "cpu/channel.h"
#include "cpu/wait.h"

namespace mnnvl::cpu {

GroupFailure::GroupFailure(int rank, const std::vector<std::byte*>& segments, const std::vector<int>& peer_pids)
    : rank_(rank) {
  const int world_size = static_cast<int>(segments.size());
  peers_.reserve(segments.size());
  for (int r = 0; r < world_size; ++r) {
    controls_.push_back(control_of(segments[r]));
    peers_.emplace_back(r == rank ? -1 : peer_pids[r]);
  }
}

void GroupFailure::describe(FailureCause aborted, uint32_t word, FailureRecord* record) const {
  if (aborted != FailureCause::kNone) {
    record->cause = aborted;
    record->peer = rank_;
  } else {
    record->cause = FailureCause::kPeerFailed;
    record->peer = abort_rank(word);
    record->told = word;
  }
}

Error GroupFailure::end(const FailureRecord& record, double waited_seconds, const FailureDetails& details) {
  // Where a rank waits for anybody, nobody else is to blame.
  const int root = record.peer == Message::kAnySource ? record.rank : record.peer;
  return remember(to_error(record, waited_seconds, details),
                  record.told != 0 ? record.told : abort_word(root, record.cause, rank_));
}

Error GroupFailure::end(const Error& error) {
  return remember(error, abort_word(rank_, FailureCause::kLocalError, rank_));
}

Error GroupFailure::remember(const Error& error, uint32_t word) {
  const bool first = first_.remember(error);
  tell_peers(word);
  return first ? error : first_.get();
}

// The first word stays: whoever is told passes on what it was told, in case its author died while telling.
void GroupFailure::tell_peers(uint32_t word) {
  for (Control* control : controls_) {
    uint32_t at_rest = 0;
    control->abort.compare_exchange_strong(at_rest, word, std::memory_order_seq_cst);
  }
  // Whatever a rank sleeps on. One that is about to sleep on a step is not woken, and finds the word in kMaxSleepMs.
  for (Control* control : controls_) {
    for (Word w : {Word::kPosted, Word::kReduced, Word::kDone}) futex_wake_all(signal_of(control, w).epoch);
    ring(control->bell);
  }
}

void GroupFailure::abort(FailureCause cause) {
  aborted_.store(cause, std::memory_order_seq_cst);
  tell_peers(abort_word(rank_, cause, rank_));
}

bool GroupFailure::peer_ended(int peer) {
  std::lock_guard<std::mutex> lock(peers_mutex_);
  return peers_[peer].ended();
}

}  // namespace mnnvl::cpu
