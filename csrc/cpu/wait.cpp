#include "cpu/wait.h"

#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>

#include "system/deadline.h"

namespace mnnvl::cpu {
namespace {

// Spinning. With a core for every rank a peer is usually less than a few microseconds behind, and a futex sleep costs 5
// (50 on a virtual machine whose idle core has to be woken). After that, or at once with more ranks than cores, the
// peer waited for may need this very core (the scheduler puts two ranks on one core when a third process is busy), so
// it is yielded: a switch costs about 1 microsecond, a sleep and its wake-up 5 to 10, and yielding to nobody 0.3. The
// sum is bounded, so that waiting for a late rank, milliseconds or minutes, leaves the cores to others.
constexpr int kPausesPerLook = 8;
constexpr int kLooksBeforeClock = 4;
constexpr auto kSpinOwnCore = std::chrono::microseconds(2);
constexpr auto kYieldOwnCore = std::chrono::microseconds(100);
constexpr auto kYieldShared = std::chrono::microseconds(200);

inline void cpu_pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("isb" ::: "memory");  // as long as x86's pause; "yield" is a no-op on most cores
#endif
}

void futex_wait(std::atomic<uint32_t>& word, uint32_t seen, std::chrono::nanoseconds at_most) {
  timespec timeout;
  timeout.tv_sec = static_cast<time_t>(at_most.count() / 1000000000);
  timeout.tv_nsec = static_cast<long>(at_most.count() % 1000000000);
  // Not FUTEX_PRIVATE: the word is shared by processes. EAGAIN, EINTR and ETIMEDOUT all mean: look again.
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAIT, seen, &timeout, nullptr, 0);
}

const char* name(Word word) {
  switch (word) {
    case Word::kPosted: return "posted";
    case Word::kReduced: return "reduced";
    case Word::kDone: return "done";
  }
  return "?";
}

// The cores that any of these processes may run on. Pids that can't be asked are taken to share ours.
int count_cores(const std::vector<int>& pids) {
  cpu_set_t all;
  CPU_ZERO(&all);
  if (sched_getaffinity(0, sizeof all, &all) != 0) return static_cast<int>(sysconf(_SC_NPROCESSORS_ONLN));
  for (int pid : pids) {
    cpu_set_t one;
    CPU_ZERO(&one);
    if (pid > 0 && sched_getaffinity(pid, sizeof one, &one) == 0) CPU_OR(&all, &all, &one);
  }
  return CPU_COUNT(&all);
}

}  // namespace

void futex_wake_all(std::atomic<uint32_t>& word) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

struct Waiter::Target {
  int peer;
  Word word;
  uint32_t expected;
  Signal& signal;

  uint32_t seen() const { return signal.epoch.load(std::memory_order_acquire); }
};

Waiter::Waiter(int rank, const std::vector<std::byte*>& segments, const std::vector<int>& peer_pids) : rank_(rank) {
  const int world_size = static_cast<int>(segments.size());
  peers_.reserve(segments.size());
  for (int r = 0; r < world_size; ++r) {
    controls_.push_back(control_of(segments[r]));
    peers_.emplace_back(r == rank ? -1 : peer_pids[r]);
  }
  own_core_ = count_cores(peer_pids) >= world_size;
}

void Waiter::begin(Operation operation, int64_t timeout_ms) {
  operation_ = operation;
  ++sequence_;
  started_ = Clock::now();
  deadline_ = started_ + std::chrono::milliseconds(clamp_timeout_ms(timeout_ms));
  check();
  throw_if_told(nullptr);
}

uint32_t Waiter::wait_slowly(int peer, Word word, uint32_t target) {
  const Target wanted{peer, word, target, signal_of(controls_[peer], word)};
  uint32_t seen;
  return spin(wanted, &seen) ? seen : sleep(wanted);
}

// Phase 1: looks without sleeping. False when its time is over.
bool Waiter::spin(const Target& target, uint32_t* seen) {
  Clock::time_point start{};
  for (int look = 0;; ++look) {
    *seen = target.seen();
    if (reached(*seen, target.expected)) return true;
    throw_if_told(&target);
    if (look < kLooksBeforeClock || own_core_) {
      for (int i = 0; i < kPausesPerLook; ++i) cpu_pause();
    }
    if (look < kLooksBeforeClock) continue;
    const Clock::time_point now = Clock::now();
    if (look == kLooksBeforeClock) start = now;
    if (own_core_ && now - start < kSpinOwnCore) continue;
    if (now - start > (own_core_ ? kYieldOwnCore : kYieldShared)) return false;
    sched_yield();
  }
}

// Phase 2: sleeps on the word, at most kMaxSleepMs at a time, and looks around in between.
uint32_t Waiter::sleep(const Target& target) {
  struct Registration {
    std::atomic<uint32_t>& sleepers;
    explicit Registration(std::atomic<uint32_t>& s) : sleepers(s) { sleepers.fetch_add(1, std::memory_order_seq_cst); }
    ~Registration() { sleepers.fetch_sub(1, std::memory_order_seq_cst); }
  } registration(target.signal.sleepers);
  for (;;) {
    const uint32_t seen = target.signal.epoch.load(std::memory_order_seq_cst);
    if (reached(seen, target.expected)) return seen;
    throw_if_told(&target);
    const Clock::time_point now = Clock::now();
    if (now >= deadline_) fail_wait(FailureCause::kDeadline, target);
    if (peers_[target.peer].ended()) {
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
  FailureDetails details;
  details.waiting = target != nullptr;
  if (target != nullptr) details.word = name(target->word);
  const FailureCause aborted = aborted_.load(std::memory_order_relaxed);
  if (aborted != FailureCause::kNone) give_up(record_of(aborted, rank_, target), details);
  const uint32_t word = controls_[rank_]->abort.load(std::memory_order_acquire);
  if (word == 0) return;
  FailureRecord record = record_of(FailureCause::kPeerFailed, abort_rank(word), target);
  record.told = word;
  give_up(record, details);
}

void Waiter::fail_wait(FailureCause cause, const Target& target) {
  FailureDetails details;
  details.word = name(target.word);
  if (cause == FailureCause::kPeerDied) details.peer_pid = peers_[target.peer].pid();
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

// The end of every failure: remembered, told to the peers, thrown.
void Waiter::give_up(const FailureRecord& record, const FailureDetails& details) {
  const Error error = to_error(record, std::chrono::duration<double>(Clock::now() - started_).count(), details);
  {
    std::lock_guard<std::mutex> lock(mutex_);
    error_ = error;
  }
  broken_.store(true, std::memory_order_release);
  tell_peers(record.told != 0 ? record.told : abort_word(record.peer, record.cause, rank_));
  throw error;
}

// The first word stays: whoever is told passes on what it was told, in case its author died while telling.
void Waiter::tell_peers(uint32_t word) {
  for (Control* control : controls_) {
    uint32_t at_rest = 0;
    control->abort.compare_exchange_strong(at_rest, word, std::memory_order_seq_cst);
  }
  // Whatever a rank sleeps on: a rank that is about to sleep is not woken, and finds the word within kMaxSleepMs.
  for (Control* control : controls_) {
    for (Word w : {Word::kPosted, Word::kReduced, Word::kDone}) futex_wake_all(signal_of(control, w).epoch);
  }
}

void Waiter::abort(FailureCause cause) {
  aborted_.store(cause, std::memory_order_seq_cst);
  tell_peers(abort_word(rank_, cause, rank_));
}

void Waiter::check() const {
  if (!broken_.load(std::memory_order_acquire)) return;
  std::lock_guard<std::mutex> lock(mutex_);
  throw Error(*error_);
}

}  // namespace mnnvl::cpu
