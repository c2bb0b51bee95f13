// Calls between startCoalescing() and endCoalescing(): collected, then run as few. All their messages are one exchange,
// which ends whatever the order of its parts; their collectives run in turn, in their order. They may not depend on one
// another: inputs that need a copy are taken as they are when a call is made, and outputs that need a copy get it when
// all have moved.
#pragma once

#include <c10/core/Event.h>
#include <c10/core/Stream.h>
#include <torch/csrc/distributed/c10d/Work.hpp>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "backend/call.h"

namespace mnnvl {

// Of one group. Any thread; each collects for itself.
class Coalescing {
 public:
  // What this thread has collected before and not run is dropped: its end never came, because of an exception.
  // Returns how many calls that were.
  size_t start();
  // What every call asks: one load while nobody collects.
  bool collecting() { return threads_.load(std::memory_order_acquire) != 0 && collecting_here(); }
  // The call is of the stream that is now current on its device.
  void add(Call call);
  // The collected calls merged: messages, then collectives, those of the CPU first. Empty if there are none. Messages
  // of `rank` to itself become copies. The current streams wait for those that the calls were made on. `timeout` is
  // that of calls without one of their own. ValueError if start() wasn't called, or for a message to itself without its
  // other end; then nothing has begun.
  std::vector<Call> end(int rank, std::chrono::milliseconds timeout);

 private:
  struct Collected {
    Call call;
    std::optional<c10::Stream> stream;  // on a GPU
    std::shared_ptr<c10::Event> ready;
  };
  bool collecting_here();

  std::mutex mutex_;
  std::map<uint64_t, std::vector<Collected>> calls_;  // by thread
  std::atomic<size_t> threads_{0};  // that collect
};

// The works of one coalesced group as one.
class CoalescedWork final : public c10d::Work {
 public:
  explicit CoalescedWork(std::vector<c10::intrusive_ptr<c10d::Work>> works) : works_(std::move(works)) {}
  bool isCompleted() override;
  bool isSuccess() const override;
  std::exception_ptr exception() const override;
  bool wait(std::chrono::milliseconds timeout = kNoTimeout) override;
  void synchronize() override;
  void abort() override;
  // Of result(), as that of every work.
  c10::intrusive_ptr<c10::ivalue::Future> getFuture() override;
  std::vector<at::Tensor> result() override;

 private:
  const std::vector<c10::intrusive_ptr<c10d::Work>> works_;
};

}  // namespace mnnvl
