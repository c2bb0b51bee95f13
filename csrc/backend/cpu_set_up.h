// One attempt to set the CPU side of a group up: begun by the group's first call, run by a job of its queue, so that no
// asynchronous call waits for it. csrc/README.md, "The CPU queue", says why nobody waits in a circle.
#pragma once

#include <atomic>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>

#include "transport/transport.h"

namespace mnnvl {

// What is called while it lasts fails with it, so that no call that was made for it meets a peer's first one in a
// further attempt. Any thread, but for run() and transport().
class CpuSetUp {
 public:
  using Make = std::function<std::shared_ptr<Transport>()>;
  // Given the transport, or why there is none. Must not throw or wait.
  using Then = std::function<void(const std::shared_ptr<Transport>&, std::exception_ptr)>;

  explicit CpuSetUp(Make make) : make_(std::move(make)) {}

  // Makes the transport, the first time. By jobs of one queue, which run one at a time.
  void run();
  // The same, and returns what was made or throws why it wasn't.
  const std::shared_ptr<Transport>& transport();
  // Begins `step` when the attempt is over, behind those that came before: now, or in run().
  void then(const Then& step);

  bool over() const { return over_.load(std::memory_order_acquire); }
  bool failed() const { return over() && failure_; }
  // Null before the end, and after a failure.
  std::shared_ptr<Transport> made() const { return over() ? made_ : nullptr; }

 private:
  Make make_;
  std::shared_ptr<Transport> made_;  // this and the next: written before over_, then only read
  std::exception_ptr failure_;
  std::atomic<bool> over_{false};
  std::mutex mutex_;
  std::deque<Then> steps_;  // under mutex_; empty once it is over well
};

}  // namespace mnnvl
