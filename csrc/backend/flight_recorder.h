// The last operations of one rank in a group, to be told when it fails and to whoever asks: what it has begun, and what
// of that has ended. And how many there were.
#pragma once

#include <ATen/ATen.h>
#include <c10/core/Event.h>

#include <array>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <map>
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

  // Since the group was made.
  struct Count {
    uint64_t calls = 0;
    uint64_t failed = 0;  // of them; on a GPU those that couldn't be enqueued
    int64_t bytes = 0;  // of this rank's inputs
  };
  struct Ticket {
    uint64_t number;
    size_t count;  // the place in counts_
  };

  explicit FlightRecorder(int rank) : rank_(rank) { counts_.reserve(kNames); }

  // How the group is called where its operations are told: "group default_pg of 2 ranks".
  void name_group(std::string name);

  // An operation that is about to be enqueued; the ticket is for the two below.
  Ticket begin(const Call& call);
  // On a GPU, where the event tells the end. In a capture nothing does.
  void enqueued(Ticket ticket, std::shared_ptr<c10::Event> end, bool capturing);
  void end(Ticket ticket, bool failed);

  // The oldest first.
  std::vector<Operation> operations() const;
  // By operation.
  std::map<std::string, Count> counts() const;
  // The operations as a table to read, without a newline at its end.
  std::string table() const;
  // Writes it into the error log, the first time, if there are any.
  void report() noexcept;

 private:
  static constexpr size_t kNames = 32;  // more than there are
  struct NamedCount : Count {
    const char* name = nullptr;
  };
  Operation& at(uint64_t number) { return ring_[number % kOperations]; }
  size_t place_of(const char* name);

  const int rank_;
  std::atomic<bool> reported_{false};
  mutable std::mutex mutex_;  // what follows
  uint64_t tickets_ = 0;
  std::array<Operation, kOperations> ring_;
  std::vector<NamedCount> counts_;  // few: looked through by address, and one name may have two
  std::string group_ = "a group";
};

const char* name(FlightRecorder::State state);

}  // namespace mnnvl
