// The last operations of one rank in a group, to be told when it fails: what it has begun, and what of that has ended.
#pragma once

#include <ATen/ATen.h>
#include <c10/core/Event.h>

#include <array>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "backend/call.h"

namespace mnnvl {

// Any thread. To record costs a few stores under a lock that nobody holds for longer; no memory is taken.
class FlightRecorder {
 public:
  static constexpr size_t kOperations = 64;

  // kEnded: on a GPU, well or not.
  enum class State { kEnqueued, kCaptured, kEnded, kCompleted, kFailed };
  struct Operation {
    uint64_t ticket = 0;
    uint64_t sequence = 0;  // of the group's collectives; of messages, that of the collective before
    const char* name = nullptr;
    int64_t bytes = 0;  // of this rank's inputs
    std::optional<at::ScalarType> dtype;  // none of a barrier
    at::Device device = at::kCPU;
    bool async = false;
    State state = State::kEnqueued;
    std::chrono::system_clock::time_point begun;
    std::shared_ptr<c10::Event> end;  // on a GPU
  };

  explicit FlightRecorder(int rank) : rank_(rank) {}

  // An operation that is about to be enqueued; the ticket is for the two below.
  uint64_t begin(const Call& call);
  // On a GPU, where the event tells the end. In a capture nothing does.
  void enqueued(uint64_t ticket, std::shared_ptr<c10::Event> end, bool capturing);
  void end(uint64_t ticket, bool failed);

  // The oldest first.
  std::vector<Operation> operations() const;
  // Writes them into the error log, the first time.
  void report() noexcept;

 private:
  Operation& at(uint64_t ticket) { return ring_[ticket % kOperations]; }

  const int rank_;
  std::atomic<bool> reported_{false};
  mutable std::mutex mutex_;  // what follows
  uint64_t tickets_ = 0;
  std::array<Operation, kOperations> ring_;
};

const char* name(FlightRecorder::State state);

}  // namespace mnnvl
