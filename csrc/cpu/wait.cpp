#include "cpu/wait.h"

#include <algorithm>

#include "system/deadline.h"

namespace mnnvl::cpu {
namespace {

const char* name(Word word) {
  switch (word) {
    case Word::kPosted: return "posted";
    case Word::kReduced: return "reduced";
    case Word::kDone: return "done";
  }
  return "?";
}

}  // namespace

struct Waiter::Target {
  int peer;
  Word word;
  uint32_t expected;
  Signal& signal;

  uint32_t seen() const { return signal.epoch.load(std::memory_order_acquire); }
};

Waiter::Waiter(int rank, const std::vector<std::byte*>& segments, bool own_core, GroupFailure& failure,
               TransportCounters::Count* slept)
    : rank_(rank), own_core_(own_core), failure_(failure), slept_(slept) {
  for (std::byte* segment : segments) controls_.push_back(control_of(segment));
}

void Waiter::begin(Operation operation, int64_t timeout_ms) {
  operation_ = operation;
  ++sequence_;
  started_ = Clock::now();
  deadline_ = started_ + std::chrono::milliseconds(clamp_timeout_ms(timeout_ms));
  failure_.check();
  throw_if_told(nullptr);
}

uint32_t Waiter::wait_slowly(int peer, Word word, uint32_t target) {
  const Target wanted{peer, word, target, signal_of(controls_[peer], word)};
  uint32_t seen;
  return spin(wanted, &seen) ? seen : sleep(wanted);
}

// Phase 1: looks without sleeping. False when its time is over.
bool Waiter::spin(const Target& target, uint32_t* seen) {
  Backoff backoff(own_core_);
  for (;;) {
    *seen = target.seen();
    if (reached(*seen, target.expected)) return true;
    throw_if_told(&target);
    if (!backoff.pause()) return false;
  }
}

// Phase 2: sleeps on the word, at most kMaxSleepMs at a time, and looks around in between.
uint32_t Waiter::sleep(const Target& target) {
  struct Registration {
    std::atomic<uint32_t>& sleepers;
    explicit Registration(std::atomic<uint32_t>& s) : sleepers(s) { sleepers.fetch_add(1, std::memory_order_seq_cst); }
    ~Registration() { sleepers.fetch_sub(1, std::memory_order_seq_cst); }
  } registration(target.signal.sleepers);
  if (slept_ != nullptr && last_slept_ != sequence_) count_one(*slept_);
  last_slept_ = sequence_;
  for (;;) {
    const uint32_t seen = target.signal.epoch.load(std::memory_order_seq_cst);
    if (reached(seen, target.expected)) return seen;
    throw_if_told(&target);
    const Clock::time_point now = Clock::now();
    if (now >= deadline_) fail_wait(FailureCause::kDeadline, target);
    if (failure_.peer_ended(target.peer)) {
      // What it published before its end counts.
      const uint32_t last = target.seen();
      if (reached(last, target.expected)) return last;
      fail_wait(FailureCause::kPeerDied, target);
    }
    const std::chrono::nanoseconds bound = std::chrono::milliseconds(kMaxSleepMs);
    futex_wait(target.signal.epoch, seen, std::min<std::chrono::nanoseconds>(bound, deadline_ - now));
  }
}

FailureRecord Waiter::record_of(FailureCause cause, int peer, const Target* target) const {
  FailureRecord record{};
  record.valid = 1;
  record.cause = cause;
  record.rank = rank_;
  record.peer = peer;
  record.operation = operation_;
  record.sequence = sequence_;
  if (target != nullptr) {
    record.expected = target->expected;
    record.seen = target->seen();
  }
  return record;
}

void Waiter::throw_if_told(const Target* target) {
  FailureRecord told{};
  if (!failure_.told(&told)) return;
  FailureDetails details;
  details.waiting = target != nullptr;
  if (target != nullptr) details.word = name(target->word);
  FailureRecord record = record_of(told.cause, told.peer, target);
  record.told = told.told;
  give_up(record, details);
}

void Waiter::fail_wait(FailureCause cause, const Target& target) {
  FailureDetails details;
  details.word = name(target.word);
  if (cause == FailureCause::kPeerDied) details.peer_pid = failure_.peer_pid(target.peer);
  give_up(record_of(cause, target.peer, &target), details);
}

void Waiter::fail_mismatch(int peer, uint32_t expected, uint32_t seen, const Mismatch& mismatch) {
  FailureRecord record = record_of(FailureCause::kMismatch, peer, nullptr);
  record.expected = expected;
  record.seen = seen;
  FailureDetails details;
  details.word = name(Word::kPosted);
  details.mismatch = &mismatch;
  give_up(record, details);
}

void Waiter::give_up(const FailureRecord& record, const FailureDetails& details) {
  throw failure_.end(record, std::chrono::duration<double>(Clock::now() - started_).count(), details);
}

}  // namespace mnnvl::cpu
