#include "backend/cpu_queue.h"

#include <atomic>
#include <future>
#include <optional>
#include <system_error>

#include "backend/errors.h"

namespace mnnvl {
namespace {

void run_call(const Call& call, GroupState& state, CpuSetUp& set_up, int64_t timeout_ms) {
  Transport& transport = *set_up.transport();
  Run run;
  run.timeout_ms = timeout_ms;
  at_torch_boundary([&] { state.run_body(call, transport, run); });
  if (call.epilogue) run_below_autograd(call.epilogue);
}

// A call of messages. Its work is completed by the later of two, the messages' end and the return of the messenger's
// post(), so that whoever is woken finds the transfer.
class Posting : public std::enable_shared_from_this<Posting> {
 public:
  Posting(Call call, c10::intrusive_ptr<CpuWork> work, std::shared_ptr<GroupState> state)
      : call_(std::move(call)),
        work_(std::move(work)),
        state_(std::move(state)),
        ticket_(state_->recorder()->begin(call_)) {}

  void begin(const std::shared_ptr<Transport>& transport, int64_t timeout_ms) {
    try {
      at_torch_boundary([&] {
        state_->guarded(call_.name, [&] {
          const auto done = [self = shared_from_this()](const std::optional<Error>& error) { self->end(error); };
          const std::shared_ptr<Messenger> messenger = transport->messenger();
          if (!messenger) fail_detached();
          work_->follow(messenger->post(call_.messages(), timeout_ms, done));
        });
      });
    } catch (...) {
      return complete(std::current_exception());  // no end will come
    }
    leave();
  }
  void complete(std::exception_ptr failure) {
    state_->recorder()->end(ticket_, failure != nullptr);
    work_->complete(failure);
  }

 private:
  void end(const std::optional<Error>& error) {
    if (error) {
      state_->fail(*error);
      try {
        at_torch_boundary([&] { state_->check(); });
      } catch (...) {
        failure_ = std::current_exception();
      }
    }
    leave();
  }
  void leave() {
    if (--left_ == 0) complete(failure_);
  }

  const Call call_;  // keeps the memory alive
  const c10::intrusive_ptr<CpuWork> work_;
  const std::shared_ptr<GroupState> state_;
  const FlightRecorder::Ticket ticket_;
  std::exception_ptr failure_;
  std::atomic<int> left_{2};
};

}  // namespace

CpuQueue::~CpuQueue() {
  jobs_->leave();
  callbacks_->leave();
}

void CpuQueue::enqueue(JobQueue::Job job, bool here) {
  bool taken = false;
  try {
    taken = jobs_->submit(std::move(job), here);
  } catch (const std::system_error& error) {  // the peers make this call without us
    state_->fail(Error(ErrorKind::kSystem,
                       str("mnnvl: rank ", state_->rank(), " got no thread for its collectives: ", error.what())));
    at_torch_boundary([this] { state_->check(); });
  }
  TORCH_CHECK_WITH(DistBackendError, taken, "mnnvl: this process group has been shut down");
}

c10::intrusive_ptr<CpuWork> CpuQueue::submit(Call call, std::shared_ptr<CpuSetUp> set_up, int64_t timeout_ms) {
  auto work = c10::make_intrusive<CpuWork>(state_->rank(), call, callbacks_);
  const bool async = call.async;
  const FlightRecorder::Ticket ticket = state_->recorder()->begin(call);
  JobQueue::Job job;
  job.run = [call = std::make_shared<Call>(std::move(call)), state = state_, set_up = std::move(set_up), timeout_ms] {
    run_call(*call, *state, *set_up, timeout_ms);
  };
  job.complete = [work, ticket, recorder = state_->recorder()](std::exception_ptr failure) {
    recorder->end(ticket, failure != nullptr);
    work->complete(failure);
  };
  try {
    enqueue(std::move(job), /*here=*/!async);
  } catch (...) {
    state_->recorder()->end(ticket, /*failed=*/true);
    throw;
  }
  return work;
}

c10::intrusive_ptr<CpuWork> CpuQueue::post(Call call, const std::shared_ptr<CpuSetUp>& set_up, int64_t timeout_ms) {
  // A job to run the set-up if no other has, but not the messages: they mustn't stand behind the collectives.
  if (!set_up->over()) enqueue({[set_up] { set_up->run(); }, [](std::exception_ptr) {}}, /*here=*/false);
  auto work = c10::make_intrusive<CpuWork>(state_->rank(), call, callbacks_);
  auto posting = std::make_shared<Posting>(std::move(call), work, state_);
  set_up->then([posting, timeout_ms](const std::shared_ptr<Transport>& transport, std::exception_ptr failure) {
    failure ? posting->complete(failure) : posting->begin(transport, timeout_ms);
  });
  return work;
}

void CpuQueue::run(const std::shared_ptr<CpuSetUp>& set_up, const Step& step) {
  const auto ended = std::make_shared<std::promise<void>>();
  const auto complete = [ended](std::exception_ptr failure) {
    failure ? ended->set_exception(failure) : ended->set_value();
  };
  enqueue({[&] { step(*set_up->transport()); }, complete}, /*here=*/true);
  ended->get_future().get();
}

void CpuQueue::stop() { jobs_->stop(); }

bool CpuQueue::wait_idle(std::chrono::milliseconds timeout) {
  return jobs_->wait_idle(timeout) && callbacks_->wait_idle(timeout);
}

}  // namespace mnnvl
