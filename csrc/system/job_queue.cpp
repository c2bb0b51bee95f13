#include "system/job_queue.h"

#include <utility>

namespace mnnvl {

bool JobQueue::submit(Job job, bool here) {
  std::unique_lock<std::mutex> lock(mutex_);
  if (stopped_) return false;
  if (here && !busy_ && jobs_.empty()) {
    run(lock, std::move(job));  // no hand-over to pay for
    return true;
  }
  if (!worker_.joinable()) {
    worker_ = std::thread([self = shared_from_this()] { self->loop(); });
    worker_id_ = worker_.get_id();
  }
  jobs_.push_back(std::move(job));
  lock.unlock();
  changed_.notify_all();
  return true;
}

// With `lock` held, which is let go while the job runs.
void JobQueue::run(std::unique_lock<std::mutex>& lock, Job job) {
  busy_ = true;
  lock.unlock();
  std::exception_ptr failure;
  try {
    job.run();
  } catch (...) {
    failure = std::current_exception();
  }
  // Before the completion: whoever that wakes finds the queue free, and may run its next job itself.
  lock.lock();
  busy_ = false;
  const bool awaited = !jobs_.empty() || stopped_;
  lock.unlock();
  if (awaited) changed_.notify_all();
  job.complete(failure);
  job = {};  // what it keeps alive is dropped without the lock
  lock.lock();
}

void JobQueue::loop() {
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    changed_.wait(lock, [this] { return !busy_ && (!jobs_.empty() || stopped_); });
    if (jobs_.empty()) return;
    Job next = std::move(jobs_.front());
    jobs_.pop_front();
    run(lock, std::move(next));
    if (jobs_.empty()) changed_.notify_all();  // for wait_idle() and stop()
  }
}

bool JobQueue::wait_idle(std::chrono::milliseconds timeout) {
  std::unique_lock<std::mutex> lock(mutex_);
  // By polling: an inline job ends without a word, which would cost each of them a wake-up call.
  const auto deadline = std::chrono::steady_clock::now() + timeout;
  while (busy_ || !jobs_.empty()) {
    if (std::chrono::steady_clock::now() >= deadline) return false;
    changed_.wait_for(lock, std::chrono::milliseconds(1));
  }
  return true;
}

void JobQueue::stop() {
  std::unique_lock<std::mutex> lock(mutex_);
  stopped_ = true;
  changed_.notify_all();
  std::thread worker = std::move(worker_);
  if (worker_id_ == std::this_thread::get_id()) {
    // What a job kept alive was the owner's last reference.
    if (worker.joinable()) worker.detach();
    return;
  }
  changed_.wait(lock, [this] { return !busy_ && jobs_.empty(); });
  lock.unlock();
  if (worker.joinable()) worker.join();
}

void JobQueue::leave() {
  std::lock_guard<std::mutex> lock(mutex_);
  stopped_ = true;
  changed_.notify_all();
  if (worker_.joinable()) worker_.detach();
}

}  // namespace mnnvl
