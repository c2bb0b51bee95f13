// A point in time by which a wait ends.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>

namespace mnnvl {

// No wait is longer: a hundred years. What users give as "never" (timedelta.max has 86 thousand million million ms)
// saturates here, so that nanoseconds, and a clock's time plus a timeout, stay within 64 bits everywhere.
constexpr int64_t kLongestTimeoutMs = int64_t{36525} * 24 * 3600 * 1000;

constexpr int64_t clamp_timeout_ms(int64_t timeout_ms) {
  return timeout_ms < 0 ? 0 : timeout_ms > kLongestTimeoutMs ? kLongestTimeoutMs : timeout_ms;
}

class Deadline {
 public:
  using Clock = std::chrono::steady_clock;
  explicit Deadline(int64_t timeout_ms)
      : timeout_ms_(clamp_timeout_ms(timeout_ms)), end_(Clock::now() + std::chrono::milliseconds(timeout_ms_)) {}

  bool passed() const { return Clock::now() >= end_; }
  // For poll(): what is left, at most `at_most` milliseconds, at least 0, rounded up so that a wait does not spin.
  int left_ms(int at_most) const {
    const int64_t left = std::chrono::duration_cast<std::chrono::milliseconds>(end_ - Clock::now()).count() + 1;
    return static_cast<int>(std::clamp<int64_t>(left, 0, at_most));
  }
  int64_t timeout_ms() const { return timeout_ms_; }

 private:
  int64_t timeout_ms_;
  Clock::time_point end_;
};

}  // namespace mnnvl
