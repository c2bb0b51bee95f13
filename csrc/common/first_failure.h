// The one memory of why a group is broken: the first cause, for ever.
#pragma once

#include <atomic>
#include <mutex>
#include <optional>

#include "common/error.h"

namespace mnnvl {

// Any thread.
class FirstFailure {
 public:
  // True if this is the first.
  bool remember(const Error& error) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (error_) return false;
    error_ = error;
    failed_.store(true, std::memory_order_release);
    return true;
  }
  // Runs `step`, whatever failed before, and remembers its Error.
  template <typename F>
  void guard(const F& step) {
    try {
      step();
    } catch (const Error& error) {
      remember(error);
    }
  }
  bool failed() const { return failed_.load(std::memory_order_acquire); }
  // What was remembered; there must be something.
  Error get() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return *error_;
  }
  // Throws what was remembered. Without a failure it costs one load.
  void check() const {
    if (!failed()) return;
    throw get();
  }

 private:
  std::atomic<bool> failed_{false};
  mutable std::mutex mutex_;
  std::optional<Error> error_;
};

}  // namespace mnnvl
