#include "backend/group_state.h"

#include "backend/errors.h"

namespace mnnvl {

void GroupState::fail(const Error& error) {
  if (!failure_.remember(error)) return;
  const FailureCause cause =
      error.kind() == ErrorKind::kAborted ? FailureCause::kLocalAbort : FailureCause::kLocalError;
  for (const auto& transport : transports()) transport->abort(cause);
  recorder_->report();
}

void GroupState::add(std::shared_ptr<Transport> transport) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    transports_.push_back(transport);
  }
  if (failure_.failed()) transport->abort(FailureCause::kLocalError);
}

std::vector<std::shared_ptr<Transport>> GroupState::transports() {
  std::lock_guard<std::mutex> lock(mutex_);
  return transports_;
}

std::vector<std::shared_ptr<Transport>> GroupState::take_transports() {
  std::lock_guard<std::mutex> lock(mutex_);
  return std::move(transports_);
}

void GroupState::abort() {
  aborted_ = true;
  fail(Error(ErrorKind::kAborted, str("mnnvl: abort() was called on this process group on rank ", rank_)));
}

void GroupState::run_body(const Call& call, Transport& transport, const Run& run) {
  guarded(call.name, [&] {
    if (call.has_messages()) {
      transport.exchange(call.messages(), run);
    } else {
      call.body(transport, run);
    }
  });
}

// In a handler.
void GroupState::rethrow_first_cause(const char* name) {
  try {
    throw;
  } catch (const Error& error) {
    if (error.kind() == ErrorKind::kInvalidArgument || error.kind() == ErrorKind::kUnsupported) throw;
    fail(error);
  } catch (const std::exception& error) {
    fail(Error(ErrorKind::kSystem, str("mnnvl: rank ", rank_, " failed in ", name, ": ", error.what())));
  }
  throw failure_.get();
}

}  // namespace mnnvl
