// Jobs that run one at a time, in their order: on the caller's thread where it would only wait, else on one worker.
//
// Who runs what, and who may wait for whom (csrc/README.md, "The CPU queue", has the argument):
//   jobs        the thread that submits, if nothing else runs or is queued and it says that it would wait anyway; else
//               the worker. `busy_` is the one word that says that a job runs, whoever runs it.
//   completion  right behind its job, on the same thread: wakes waiters, runs no code of a user, so the worker never
//               waits for anything but the collective that it runs, which ends by its deadline.
//   callbacks   never here: callback_threads.h.
#pragma once

#include <chrono>
#include <condition_variable>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>

namespace mnnvl {

// Shared with its worker, so that the owner may leave it behind. Any thread may call anything.
class JobQueue : public std::enable_shared_from_this<JobQueue> {
 public:
  struct Job {
    std::function<void()> run;
    // Given what `run` threw, or null. Must not throw, and must not run code that may wait for a job.
    std::function<void(std::exception_ptr)> complete;
  };

  // With `here` the job may have run on return. False: the queue is stopped, and the job was not taken. Throws
  // std::system_error where the system gives no thread; then it was not taken either.
  bool submit(Job job, bool here);
  // True once nothing runs or is queued; false after `timeout`.
  bool wait_idle(std::chrono::milliseconds timeout);
  // Takes no more jobs, and returns when all that were taken have run. Idempotent.
  void stop();
  // The same without waiting: the worker ends by itself behind the last job.
  void leave();

 private:
  void run(std::unique_lock<std::mutex>& lock, Job job);
  void loop();

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Job> jobs_;
  bool busy_ = false, stopped_ = false;
  std::thread worker_;
  std::thread::id worker_id_;
};

}  // namespace mnnvl
