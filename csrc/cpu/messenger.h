// The threads behind a rank's messages: who moves them (message_flow.h), who waits, who sleeps.
//
// One thread at a time drives: it moves messages until what it waits for has come, looking, yielding and sleeping as
// backoff.h says, on its rank's bell (channel.h).
//   - post() moves what it can, once, and leaves. Most small messages are over then.
//   - A thread in Transfer::wait() drives, so that no message on its way to it passes through another thread's hands.
//     While one drives, other waiters block, and one of them takes over when it leaves.
//   - While messages are under way and nobody waits, the background thread drives. It is no part of a message that
//     somebody waits for: it looks whether it is needed every kArmedSleep only, so that nobody has to wake it, and
//     hands the driving back at once. Beside a long wait it looks less often. When nothing has been under way for a
//     while it sleeps until a post that leaves something to do. It is made by the first such post: a rank that sends
//     no messages has none.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>

#include "cpu/group_failure.h"
#include "cpu/message_flow.h"
#include "cpu/segment.h"
#include "protocol/messenger.h"

namespace mnnvl::cpu {

// Shared with its transfers and its thread; in a std::shared_ptr.
class Messenger final : public mnnvl::Messenger, public std::enable_shared_from_this<Messenger> {
 public:
  // `failure` and the segments must outlive stop(), not the messenger.
  Messenger(const CommunicatorOptions& options, GroupFailure& failure);

  std::shared_ptr<Transfer> post(const ExchangeRequest& request, int64_t timeout_ms, Done done) override;
  bool wait_idle(std::chrono::milliseconds timeout) override;
  // Takes no more messages, breaks the group if some are under way, which ends them, and returns when no thread will
  // touch a segment again. Idempotent.
  void stop();

 private:
  using Clock = TransferState::Clock;
  using Lock = std::unique_lock<std::mutex>;
  class Posted;
  enum class Driver { kNobody, kWaiter, kBackground };

  Lock enter();
  bool wait(Posted& transfer, Clock::time_point deadline);
  template <typename Over>
  void drive(Lock& lock, Over over, Clock::time_point deadline);
  template <typename Over>
  void sleep(Lock& lock, Over over, Clock::time_point deadline);
  void settle(Lock& lock);
  void block(Lock& lock, Clock::time_point deadline);
  void wake_blocked();
  void give_way(Lock& lock);
  void arm();
  void background();
  void check_request(const ExchangeRequest& request, int64_t timeout_ms) const;

  const int rank_;
  const int world_size_;
  const bool own_core_;
  const std::chrono::milliseconds max_sleep_;
  GroupFailure& failure_;
  Bell* const bell_;  // own

  std::mutex mutex_;  // of all below
  std::atomic<int> entering_{0};  // threads that want the mutex, for whom the driver makes room
  MessageFlow flow_;
  std::condition_variable changed_;  // transfers have ended, or the driver has left
  int blocked_ = 0;  // on changed_
  int waking_ = 0;  // of them, those that have been woken and want the mutex
  Driver driver_ = Driver::kNobody;
  std::thread::id driver_id_;
  int unsettled_ = 0;  // transfers that are outstanding, or whose Done hasn't returned
  bool stopped_ = false;

  std::thread background_;
  std::condition_variable armed_;  // of the background thread
  bool asleep_ = false;  // it sleeps until it is told
  bool napping_ = false;  // it sleeps longer than usual, beside a long wait
  uint64_t waits_ = 0;  // that have driven
};

}  // namespace mnnvl::cpu
