// Whether this process is still the one that made something, or a child of it by fork(). A child has its parent's
// memory and descriptors and none of its threads; a rank it is not.
#pragma once

#include <unistd.h>

#include <atomic>
#include <cstdint>

namespace mnnvl {

class Birthplace {
 public:
  // A load. Async-signal-safe.
  bool left() const { return generation_ != now_.load(std::memory_order_relaxed); }
  // Error(kSystem) in a child, that says whose this `made` thing is; else nothing.
  void check(const char* made) const {
    if (left()) refuse(made);
  }

 private:
  [[noreturn]] void refuse(const char* made) const;

  static std::atomic<uint32_t> now_;  // forks between the first process and this one
  friend struct CountForks;

  const uint32_t generation_ = now_.load(std::memory_order_relaxed);
  const pid_t pid_ = getpid();
};

}  // namespace mnnvl
