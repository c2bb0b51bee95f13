#include "backend/cpu_queue.h"

#include <c10/util/Exception.h>

#include "backend/errors.h"

namespace mnnvl {

void run_body(const Body& body, Transport& transport, void* stream) {
  try {
    body(transport, stream);
  } catch (const Error& error) {
    if (error.kind() == ErrorKind::kSystem) transport.abort();
    throw;
  } catch (...) {
    transport.abort();
    throw;
  }
}

void CpuQueue::submit(Job job, bool async) {
  std::unique_lock<std::mutex> lock(mutex_);
  TORCH_CHECK_WITH(DistBackendError, !stopped_, "mnnvl: this process group has been shut down");
  jobs_.push_back(std::move(job));
  if (std::this_thread::get_id() == worker_id_) {
    // A callback of a finished work calls again, and may wait for it: nobody else would run it.
    while (!jobs_.empty()) run_next(lock);
  } else if (!async && jobs_.size() == 1 && !busy_) {
    run_next(lock);  // on the caller's own thread: no hand-over to pay for
  } else if (!worker_.joinable()) {
    worker_ = std::thread([self = shared_from_this()] { self->loop(); });
    worker_id_ = worker_.get_id();
  }
  changed_.notify_all();
}

// With `lock` held, which is let go while the job and its callbacks run.
void CpuQueue::run_next(std::unique_lock<std::mutex>& lock) {
  Job job = std::move(jobs_.front());
  jobs_.pop_front();
  busy_ = true;
  lock.unlock();
  std::exception_ptr failure;
  try {
    at_torch_boundary([&] { run_body(job.body, *job.transport, /*stream=*/nullptr); });
  } catch (...) {
    failure = std::current_exception();
  }
  lock.lock();
  busy_ = false;
  lock.unlock();
  changed_.notify_all();
  job.work->complete(failure);
  job = {};  // drops its tensors without the lock
  lock.lock();
}

void CpuQueue::loop() {
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    changed_.wait(lock, [this] { return !busy_ && (!jobs_.empty() || stopped_); });
    if (jobs_.empty()) return;
    run_next(lock);
  }
}

void CpuQueue::stop() {
  std::thread worker;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stopped_ = true;
    worker = std::move(worker_);
  }
  changed_.notify_all();
  if (worker.joinable() && worker.get_id() == std::this_thread::get_id()) {
    worker.detach();  // asked from a callback: the thread ends behind it
  } else if (worker.joinable()) {
    worker.join();
  }
}

}  // namespace mnnvl
