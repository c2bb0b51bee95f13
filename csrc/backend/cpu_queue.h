// Collectives on CPU tensors, in their order: a JobQueue whose jobs are Calls, the first of which sets the group up,
// and the threads for their callbacks.
// csrc/README.md, "The CPU queue", says who runs what and who may wait for whom.
#pragma once

#include <chrono>
#include <functional>
#include <memory>

#include "backend/call.h"
#include "backend/cpu_set_up.h"
#include "backend/group_state.h"
#include "backend/work.h"
#include "system/callback_threads.h"
#include "system/job_queue.h"

namespace mnnvl {

class CpuQueue {
 public:
  explicit CpuQueue(std::shared_ptr<GroupState> state) : state_(std::move(state)) {}
  // Leaves the threads behind; they end by themselves, each job by its deadline.
  ~CpuQueue();

  // Any thread, callbacks of finished works included. A synchronous call may have run on return.
  c10::intrusive_ptr<CpuWork> submit(Call call, std::shared_ptr<CpuSetUp> set_up, int64_t timeout_ms);
  // Point-to-point: begins the call's messages, when the set-up is over, beside the jobs. Any thread.
  c10::intrusive_ptr<CpuWork> post(Call call, const std::shared_ptr<CpuSetUp>& set_up, int64_t timeout_ms);
  // Runs the set-up if need be, then `step`, as a job that the caller waits for; throws what it threw.
  using Step = std::function<void(Transport&)>;
  void run(const std::shared_ptr<CpuSetUp>& set_up, const Step& step);
  // Runs what is queued, each job ending by its deadline; then submit() throws. Idempotent.
  void stop();
  // True once no job and no callback runs or is queued; false after `timeout`.
  bool wait_idle(std::chrono::milliseconds timeout);

 private:
  void enqueue(JobQueue::Job job, bool here);

  const std::shared_ptr<GroupState> state_;
  const std::shared_ptr<JobQueue> jobs_ = std::make_shared<JobQueue>();
  const std::shared_ptr<CallbackThreads> callbacks_ = std::make_shared<CallbackThreads>();
};

}  // namespace mnnvl
