#include "cpu/messenger.h"

#include <sched.h>

#include <algorithm>
#include <system_error>

#include "system/deadline.h"

namespace mnnvl::cpu {
namespace {

constexpr auto kArmedSleep = std::chrono::microseconds(500);
constexpr int kQuietSleeps = 20;  // in a row with nothing under way: then it is told when to wake
constexpr int kTurnsPerLook = 64;  // at the clock, and then around, while there is no time to sleep
constexpr int kYieldsToOthers = 100;
constexpr auto kLookInterval = std::chrono::milliseconds(10);

}  // namespace

class Messenger::Posted final : public Transfer, public TransferState {
 public:
  explicit Posted(std::shared_ptr<Messenger> messenger) : messenger_(std::move(messenger)) {}
  bool wait(std::chrono::steady_clock::time_point until) override {
    return over.load(std::memory_order_acquire) || messenger_->wait(*this, until);
  }
  int source() const override { return TransferState::source; }

  std::atomic<bool> over{false};  // finished, and its Done has returned

 private:
  const std::shared_ptr<Messenger> messenger_;
};

Messenger::Messenger(const CommunicatorOptions& options, GroupFailure& failure)
    : rank_(options.rank),
      world_size_(options.world_size),
      own_core_(enough_cores(options.peer_pids)),
      max_sleep_(options.max_sleep_ms),
      failure_(failure),
      bell_(&control_of(options.segments[options.rank])->bell),
      flow_(options, failure) {}

void Messenger::check_request(const ExchangeRequest& request, int64_t timeout_ms) const {
  const auto check = [this](const Message& message, Operation operation) {
    const bool any = operation == Operation::kRecv && message.peer == Message::kAnySource && world_size_ > 1;
    if (!any && (message.peer < 0 || message.peer >= world_size_ || message.peer == rank_)) {
      fail(ErrorKind::kInvalidArgument, "mnnvl: ", name(operation), " on rank ", rank_, " with rank ", message.peer,
           " in a group of ", world_size_);
    }
    if (message.bytes < 0) {
      fail(ErrorKind::kInvalidArgument, "mnnvl: ", name(operation), " of ", message.bytes, " bytes");
    }
  };
  for (int i = 0; i < request.send_count; ++i) check(request.sends[i], Operation::kSend);
  for (int i = 0; i < request.receive_count; ++i) check(request.receives[i], Operation::kRecv);
  if (timeout_ms <= 0) fail(ErrorKind::kInvalidArgument, "mnnvl: timeout must be positive, got ", timeout_ms, " ms");
}

// The mutex, which a driver takes and leaves all the time: a thread that blocks on it might never be the first.
Messenger::Lock Messenger::enter() {
  entering_.fetch_add(1, std::memory_order_relaxed);
  Lock lock(mutex_);
  entering_.fetch_sub(1, std::memory_order_relaxed);
  return lock;
}

std::shared_ptr<mnnvl::Messenger::Transfer> Messenger::post(const ExchangeRequest& request, int64_t timeout_ms,
                                                            Done done) {
  check_request(request, timeout_ms);
  const auto transfer = std::make_shared<Posted>(shared_from_this());
  transfer->done = std::move(done);
  transfer->started = Clock::now();
  transfer->deadline = transfer->started + std::chrono::milliseconds(clamp_timeout_ms(timeout_ms));
  Lock lock = enter();
  if (stopped_) fail(ErrorKind::kAborted, "mnnvl: rank ", rank_, " has left the group: it takes no more messages");
  try {
    flow_.post(request, transfer);
  } catch (const Error&) {
    settle(lock);  // what was under way has ended too
    throw;
  }
  ++unsettled_;
  if (!transfer->finished) arm();
  settle(lock);
  return transfer;
}

// Sees to it that the background thread will look.
void Messenger::arm() {
  if (background_.joinable()) {
    if (asleep_ || (napping_ && driver_ == Driver::kNobody)) armed_.notify_one();
    asleep_ = false;
    return;
  }
  try {
    background_ = std::thread([self = shared_from_this()] { self->background(); });
  } catch (const std::system_error& error) {
    flow_.fail_here(str("got no thread: ", error.what()));
  }
}

// Hands the finished transfers their end, without the lock.
void Messenger::settle(Lock& lock) {
  if (!flow_.has_finished()) return;
  const auto finished = flow_.take_finished();
  lock.unlock();
  for (const auto& transfer : finished) {
    const Done done = std::exchange(transfer->done, nullptr);
    if (done) done(transfer->error);
  }
  lock = enter();
  for (const auto& transfer : finished) static_cast<Posted&>(*transfer).over.store(true, std::memory_order_release);
  unsettled_ -= static_cast<int>(finished.size());
  wake_blocked();
}

bool Messenger::wait(Posted& transfer, Clock::time_point deadline) {
  const auto self = shared_from_this();  // a Done may let go of what holds it
  Lock lock = enter();
  while (!transfer.over.load(std::memory_order_relaxed)) {
    const Clock::time_point now = Clock::now();
    if (now >= deadline) {
      flow_.look_around(now);
      flow_.advance();
      settle(lock);
      return transfer.over.load(std::memory_order_relaxed);
    }
    if (driver_ == Driver::kWaiter || stopped_) {
      block(lock, deadline);
      continue;
    }
    if (driver_ == Driver::kBackground) ring(*bell_);
    driver_ = Driver::kWaiter;
    driver_id_ = std::this_thread::get_id();
    ++waits_;
    drive(lock, [&] { return transfer.over.load(std::memory_order_relaxed); }, deadline);
    driver_ = Driver::kNobody;
    wake_blocked();
    if (napping_ && flow_.outstanding()) armed_.notify_one();
  }
  return true;
}

// Until woken or `deadline`, or for no reason.
void Messenger::block(Lock& lock, Clock::time_point deadline) {
  ++blocked_;
  changed_.wait_until(lock, std::min(deadline, Clock::now() + std::chrono::hours(1)));
  --blocked_;
  if (waking_ > 0) --waking_;
}

void Messenger::wake_blocked() {
  waking_ = blocked_;
  if (blocked_ > 0) changed_.notify_all();
}

// Moves messages until over(), asked under the lock, or until `deadline`; at least once. Touches no segment once the
// messenger has been stopped.
template <typename Over>
void Messenger::drive(Lock& lock, Over over, Clock::time_point deadline) {
  Backoff backoff(own_core_);
  Clock::time_point next_look = Clock::time_point::max();  // not known yet
  for (int turn = 1;; ++turn) {
    const bool moved = flow_.advance();
    settle(lock);
    if (over() || stopped_) return;
    if (turn % kTurnsPerLook == 0) {
      const Clock::time_point now = Clock::now();
      if (now >= deadline) return;
      if (now >= next_look) flow_.look_around(now);
      if (now >= next_look || turn == kTurnsPerLook) next_look = now + kLookInterval;
    }
    if (moved) {
      backoff = Backoff(own_core_);
      give_way(lock);
      continue;
    }
    lock.unlock();
    const bool look_on = backoff.pause();
    lock.lock();
    if (look_on) continue;
    sleep(lock, over, deadline);
    settle(lock);
    if (over() || stopped_ || Clock::now() >= deadline) return;
    backoff = Backoff(own_core_);
  }
}

// Between two turns that moved something. A while, no longer: who was to wake may have woken for its deadline.
void Messenger::give_way(Lock& lock) {
  for (int i = 0; i < kYieldsToOthers && (waking_ > 0 || entering_.load(std::memory_order_relaxed) > 0); ++i) {
    lock.unlock();
    sched_yield();
    lock.lock();
  }
  waking_ = 0;
}

// Sleeps on the bell until something has moved or ended, over() or `deadline`, and looks around in between.
template <typename Over>
void Messenger::sleep(Lock& lock, Over over, Clock::time_point deadline) {
  bell_->sleepers.fetch_add(1, std::memory_order_seq_cst);
  for (;;) {
    const uint32_t seen = bell_->rings.load(std::memory_order_seq_cst);
    const Clock::time_point now = Clock::now();
    flow_.look_around(now);
    if (flow_.advance() || flow_.has_finished() || over() || stopped_ || now >= deadline) break;
    const Clock::time_point until = std::min({now + max_sleep_, deadline, flow_.next_deadline()});
    lock.unlock();
    futex_wait(bell_->rings, seen, std::max(until - now, Clock::duration(std::chrono::microseconds(1))));
    lock = enter();
  }
  bell_->sleepers.fetch_sub(1, std::memory_order_seq_cst);
}

void Messenger::background() {
  const auto needed = [this] { return driver_ == Driver::kBackground && flow_.outstanding(); };
  Lock lock = enter();
  Clock::duration nap = kArmedSleep;
  uint64_t waits = 0;
  for (int quiet = 0; !stopped_;) {
    if (quiet == kQuietSleeps) {
      asleep_ = true;
      armed_.wait(lock, [this] { return !asleep_ || stopped_; });
      quiet = 0;
    }
    napping_ = nap > kArmedSleep;
    armed_.wait_for(lock, nap);
    napping_ = false;
    if (stopped_) break;
    // Still the same wait: that is a long one, and tells when it ends.
    const bool long_wait = driver_ == Driver::kWaiter && waits_ == waits;
    nap = long_wait ? std::min<Clock::duration>(2 * nap, std::chrono::milliseconds(kMaxSleepMs)) : kArmedSleep;
    waits = waits_;
    quiet = flow_.outstanding() ? 0 : quiet + 1;
    if (quiet > 0 || driver_ != Driver::kNobody) continue;
    driver_ = Driver::kBackground;
    driver_id_ = std::this_thread::get_id();
    drive(lock, [&] { return !needed(); }, Clock::time_point::max());
    if (driver_ == Driver::kBackground) driver_ = Driver::kNobody;
    wake_blocked();
  }
}

bool Messenger::wait_idle(std::chrono::milliseconds timeout) {
  const auto limit = std::chrono::milliseconds(clamp_timeout_ms(timeout.count()));
  const Clock::time_point deadline = Clock::now() + limit;
  Lock lock = enter();
  while (unsettled_ > 0 && Clock::now() < deadline) block(lock, deadline);
  return unsettled_ == 0;
}

void Messenger::stop() {
  std::thread background;
  {
    Lock lock = enter();
    if (std::exchange(stopped_, true)) return;
    if (flow_.outstanding()) {
      failure_.abort(FailureCause::kLocalAbort);
      flow_.advance();
    }
    settle(lock);
    armed_.notify_all();
    ring(*bell_);
    // A Done may be what brought this thread here: then it drives itself, and touches nothing any more.
    while (driver_ != Driver::kNobody && driver_id_ != std::this_thread::get_id()) {
      block(lock, Clock::now() + std::chrono::milliseconds(kMaxSleepMs));
    }
    background = std::move(background_);
  }
  if (!background.joinable()) return;
  if (background.get_id() == std::this_thread::get_id()) {
    background.detach();
  } else {
    background.join();
  }
}

}  // namespace mnnvl::cpu
