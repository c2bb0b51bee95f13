#include "backend/cpu_queue.h"

#include <ATen/ThreadLocalState.h>

#include <optional>
#include <system_error>

#include "backend/errors.h"
#include "system/float_environment.h"

namespace mnnvl {
namespace {

// Of the caller, for calls that use ATen on another thread.
std::optional<at::ThreadLocalState> thread_state_for(const Call& call) {
  if (!call.epilogue) return std::nullopt;
  return at::ThreadLocalState();
}

void run_call(const Call& call, GroupState& state, Transport& transport, int64_t timeout_ms) {
  // Whatever mode the calling thread is in: every rank's arithmetic is the same.
  const FloatEnvironment ieee;
  Run run;
  run.timeout_ms = timeout_ms;
  at_torch_boundary([&] { state.run_body(call, transport, run); });
  if (call.epilogue) run_below_autograd(call.epilogue);
}

}  // namespace

CpuQueue::~CpuQueue() {
  jobs_->leave();
  callbacks_->leave();
}

c10::intrusive_ptr<CpuWork> CpuQueue::submit(Call call, std::shared_ptr<Transport> transport, int64_t timeout_ms) {
  auto work = c10::make_intrusive<CpuWork>(state_->rank(), call, callbacks_);
  const bool async = call.async;
  const uint64_t ticket = state_->recorder()->begin(call);
  JobQueue::Job job;
  job.run = [call = std::make_shared<Call>(std::move(call)), state = state_, transport = std::move(transport),
             timeout_ms, thread_state = thread_state_for(call)] {
    std::optional<at::ThreadLocalStateGuard> as_the_caller;
    if (thread_state) as_the_caller.emplace(*thread_state);
    run_call(*call, *state, *transport, timeout_ms);
  };
  job.complete = [work, ticket, recorder = state_->recorder()](std::exception_ptr failure) {
    recorder->end(ticket, failure != nullptr);
    work->complete(failure);
  };
  bool taken = false;
  try {
    taken = jobs_->submit(std::move(job), /*here=*/!async);
  } catch (const std::system_error& error) {  // the peers make this call without us
    state_->fail(Error(ErrorKind::kSystem,
                       str("mnnvl: rank ", state_->rank(), " got no thread for its collectives: ", error.what())));
    at_torch_boundary([this] { state_->check(); });
  }
  if (!taken) state_->recorder()->end(ticket, /*failed=*/true);
  TORCH_CHECK_WITH(DistBackendError, taken, "mnnvl: this process group has been shut down");
  return work;
}

c10::intrusive_ptr<CpuWork> CpuQueue::post(Call call, std::shared_ptr<Transport> transport, int64_t timeout_ms) {
  auto work = c10::make_intrusive<CpuWork>(state_->rank(), call, callbacks_);
  const ExchangeRequest request = call.messages();
  state_->check();
  const uint64_t ticket = state_->recorder()->begin(call);
  // Keeps the memory alive.
  auto done = [work, ticket, state = state_,
               call = std::make_shared<Call>(std::move(call))](const std::optional<Error>& error) {
    state->recorder()->end(ticket, error.has_value());
    std::exception_ptr failure;
    if (error) {
      state->fail(*error);
      try {
        at_torch_boundary([&] { state->check(); });
      } catch (...) {
        failure = std::current_exception();
      }
    }
    work->complete(failure);
  };
  work->follow(transport->messenger()->post(request, timeout_ms, std::move(done)));
  return work;
}

void CpuQueue::stop() { jobs_->stop(); }

bool CpuQueue::wait_idle(std::chrono::milliseconds timeout) {
  return jobs_->wait_idle(timeout) && callbacks_->wait_idle(timeout);
}

}  // namespace mnnvl
