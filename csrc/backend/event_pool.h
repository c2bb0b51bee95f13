// Events that come back when nobody holds them: to make and to destroy one costs as much as to record it.
#pragma once

#include <c10/core/Event.h>

#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "system/birthplace.h"

namespace mnnvl {

// Any thread; of one device.
class EventPool {
 public:
  explicit EventPool(c10::DeviceType type) : shared_(std::make_shared<Shared>(type)) {}

  // To be recorded before it is asked or waited for, whatever it was recorded in before.
  std::shared_ptr<c10::Event> take() {
    std::unique_ptr<c10::Event> event;
    {
      std::lock_guard<std::mutex> lock(shared_->mutex);
      if (!shared_->idle.empty()) {
        event = std::move(shared_->idle.back());
        shared_->idle.pop_back();
      }
    }
    if (!event) event = std::make_unique<c10::Event>(shared_->type);
    return {event.release(), [shared = shared_](c10::Event* one) { shared->put(std::unique_ptr<c10::Event>(one)); }};
  }

 private:
  struct Shared {
    explicit Shared(c10::DeviceType of) : type(of) {}
    void put(std::unique_ptr<c10::Event> event) {
      constexpr size_t kMost = 128;  // more than the flight recorder holds
      if (birthplace.left()) {
        (void)event.release();  // of the parent's context
        return;
      }
      std::lock_guard<std::mutex> lock(mutex);
      if (idle.size() < kMost) idle.push_back(std::move(event));
    }

    const c10::DeviceType type;
    const Birthplace birthplace;
    std::mutex mutex;
    std::vector<std::unique_ptr<c10::Event>> idle;
  };
  const std::shared_ptr<Shared> shared_;
};

}  // namespace mnnvl
