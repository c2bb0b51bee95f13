#include "system/callback_threads.h"

#include <system_error>
#include <thread>
#include <utility>

namespace mnnvl {

void CallbackThreads::post(std::function<void()> callback) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (threads_ > running_ || add_thread()) {
      pending_.push_back(std::move(callback));
      posted_.notify_one();
      return;
    }
  }
  callback();
}

// Under the lock. False where the system gives no thread.
bool CallbackThreads::add_thread() {
  try {
    std::thread([self = shared_from_this()] { self->loop(); }).detach();
  } catch (const std::system_error&) {
    return false;
  }
  ++threads_;
  return true;
}

// Waits until this thread is to run the first pending callback. False: it is to end.
bool CallbackThreads::next(std::unique_lock<std::mutex>& lock) {
  for (;;) {
    posted_.wait(lock, [this] { return !pending_.empty() || left_; });
    if (pending_.empty()) return false;
    if (running_ == 0) return true;
    const uint64_t taken = taken_;
    const bool moved = posted_.wait_for(lock, kPatience, [&] { return pending_.empty() || running_ == 0; });
    if (!moved && taken == taken_) return true;
  }
}

void CallbackThreads::loop() {
  std::unique_lock<std::mutex> lock(mutex_);
  while (next(lock)) {
    std::function<void()> callback = std::move(pending_.front());
    pending_.pop_front();
    if (!pending_.empty()) posted_.notify_one();  // the word of a post may have come to a thread that was being patient
    ++taken_;
    ++running_;
    // Somebody must be there to see that this one takes long.
    if (threads_ == running_) add_thread();
    lock.unlock();
    callback();
    callback = nullptr;
    lock.lock();
    --running_;
    if (!pending_.empty()) {
      posted_.notify_one();
    } else if (running_ == 0) {
      idle_.notify_all();
    }
    if (threads_ > running_ + 2) break;
  }
  --threads_;
}

bool CallbackThreads::wait_idle(std::chrono::milliseconds timeout) {
  std::unique_lock<std::mutex> lock(mutex_);
  return idle_.wait_for(lock, timeout, [this] { return pending_.empty() && running_ == 0; });
}

void CallbackThreads::leave() {
  std::lock_guard<std::mutex> lock(mutex_);
  left_ = true;
  posted_.notify_all();
}

}  // namespace mnnvl
