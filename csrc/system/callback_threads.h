// Runs callbacks of users: code that may take long, start collectives, and wait for them. So it never runs where
// collectives run, and one callback that waits never keeps another from running.
#pragma once

#include <chrono>
#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>

namespace mnnvl {

// Callbacks begin in the order in which they were posted, one at a time as long as none takes long: one that is kept
// from its turn for kPatience gets a thread of its own, since the running one may be waiting for it. Threads are made
// when there is something to do; they share this object, which its owner may leave behind.
class CallbackThreads : public std::enable_shared_from_this<CallbackThreads> {
 public:
  static constexpr auto kPatience = std::chrono::milliseconds(1);

  // Any thread. `callback` must not throw. Where the system gives no thread, it runs on the poster's.
  void post(std::function<void()> callback);
  // True once nothing runs or is pending; false after `timeout`.
  bool wait_idle(std::chrono::milliseconds timeout);
  // The owner goes: threads end as soon as nothing is pending. Later posts are served all the same.
  void leave();

 private:
  bool add_thread();
  bool next(std::unique_lock<std::mutex>& lock);
  void loop();

  std::mutex mutex_;
  std::condition_variable posted_, idle_;
  std::deque<std::function<void()>> pending_;
  int threads_ = 0, running_ = 0;
  uint64_t taken_ = 0;  // callbacks begun so far
  bool left_ = false;
};

}  // namespace mnnvl
