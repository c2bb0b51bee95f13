#include "backend/cpu_set_up.h"

#include <utility>

namespace mnnvl {

void CpuSetUp::run() {
  if (over()) return;
  try {
    made_ = make_();
  } catch (...) {
    failure_ = std::current_exception();
    over_.store(true, std::memory_order_release);  // before anybody hears of it, whose next call begins another attempt
  }
  make_ = nullptr;
  std::unique_lock<std::mutex> lock(mutex_);
  while (!steps_.empty()) {
    const Then step = std::move(steps_.front());
    steps_.pop_front();
    lock.unlock();
    step(made_, failure_);
    lock.lock();
  }
  over_.store(true, std::memory_order_release);
}

const std::shared_ptr<Transport>& CpuSetUp::transport() {
  run();
  if (failure_) std::rethrow_exception(failure_);
  return made_;
}

void CpuSetUp::then(const Then& step) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!over()) return steps_.push_back(step);
  }
  step(made_, failure_);
}

}  // namespace mnnvl
