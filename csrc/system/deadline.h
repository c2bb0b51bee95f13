// A point in time by which a wait ends.
#pragma once

#include <algorithm>
#include <chrono>

namespace mnnvl {

class Deadline {
 public:
  using Clock = std::chrono::steady_clock;
  explicit Deadline(int timeout_ms)
      : timeout_ms_(timeout_ms), end_(Clock::now() + std::chrono::milliseconds(timeout_ms)) {}

  bool passed() const { return Clock::now() >= end_; }
  // For poll(): what is left, at most `at_most` milliseconds, at least 0, rounded up so that a wait does not spin.
  int left_ms(int at_most) const {
    auto left = std::chrono::duration_cast<std::chrono::milliseconds>(end_ - Clock::now()).count() + 1;
    return static_cast<int>(std::clamp<long long>(left, 0, at_most));
  }
  int timeout_ms() const { return timeout_ms_; }

 private:
  int timeout_ms_;
  Clock::time_point end_;
};

}  // namespace mnnvl
