// Runs the collectives on CPU tensors in their order: on the caller's thread where it would only wait, else on one worker.
#pragma once

#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "transport/transport.h"
#include "backend/work.h"

namespace mnnvl {

// What one collective does, given its transport and native stream (null on the CPU).
using Body = std::function<void(Transport&, void* stream)>;

// Runs a body. If that fails in mid-way for reasons other than the group's failure, this rank can't be paired with its peers
// again, since part of it may have run: the transport is aborted.
void run_body(const Body& body, Transport& transport, void* stream);

// Shared with its worker, so that a callback there may drop the last reference to the group. The owner calls stop().
class CpuQueue : public std::enable_shared_from_this<CpuQueue> {
 public:
  struct Job {
    c10::intrusive_ptr<CpuWork> work;
    std::vector<at::Tensor> kept;  // alive until the body has run
    std::shared_ptr<Transport> transport;
    Body body;
  };

  // Any thread, callbacks of finished works included. With `async` false it may return with the job done.
  void submit(Job job, bool async);
  // Runs what is queued, each job ending by its deadline; then submit() throws. Idempotent.
  void stop();

 private:
  void run_next(std::unique_lock<std::mutex>& lock);
  void loop();

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Job> jobs_;
  bool busy_ = false, stopped_ = false;
  std::thread worker_;
  std::thread::id worker_id_;
};

}  // namespace mnnvl
