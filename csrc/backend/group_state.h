// What the queues and works of one group share: why it is broken, and how it is told.
#pragma once

#include <atomic>
#include <memory>
#include <vector>

#include "backend/call.h"
#include "backend/flight_recorder.h"
#include "common/first_failure.h"

namespace mnnvl {

class GroupState {
 public:
  explicit GroupState(int rank) : rank_(rank), recorder_(std::make_shared<FlightRecorder>(rank)) {}

  int rank() const { return rank_; }
  // Its own object, for transports to hold, which this one holds.
  const std::shared_ptr<FlightRecorder>& recorder() const { return recorder_; }
  const FirstFailure& failure() const { return failure_; }
  void check() const { failure_.check(); }
  // Of abort(): ends set-ups, which have no transport yet.
  const std::atomic<bool>& aborted() const { return aborted_; }

  // Remembers `error` if it is the first; then ends all waits of this rank on every transport, and tells the peers:
  // they may wait for this rank on the other device type, where nothing has failed yet. The last operations go to the
  // error log. Any thread.
  void fail(const Error& error);
  void abort();
  // A transport to be told. One that comes when the group has failed is told at once.
  void add(std::shared_ptr<Transport> transport);
  // At shutdown.
  std::vector<std::shared_ptr<Transport>> take_transports();

  // Runs a communication of a call. If that fails, the group is broken, but for arguments that the transport refused
  // before it sent anything; what is thrown is the first cause.
  template <typename F>
  void guarded(const char* name, const F& communicate) {
    failure_.check();
    try {
      communicate();
    } catch (...) {
      rethrow_first_cause(name);
    }
  }
  // The same of its body.
  void run_body(const Call& call, Transport& transport, const Run& run);

 private:
  [[noreturn]] void rethrow_first_cause(const char* name);
  std::vector<std::shared_ptr<Transport>> transports();

  const int rank_;
  const std::shared_ptr<FlightRecorder> recorder_;
  std::atomic<bool> aborted_{false};
  FirstFailure failure_;
  std::mutex mutex_;
  std::vector<std::shared_ptr<Transport>> transports_;
};

}  // namespace mnnvl
