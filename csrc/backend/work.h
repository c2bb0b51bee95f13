// The Work of one call. A Work owes its user: wait(), which orders the caller's stream (GPU) or blocks (CPU) and
// raises the group's failure; a future, for DDP; isCompleted() that never blocks.
#pragma once

#include <ATen/core/ivalue.h>
#include <c10/core/Event.h>
#include <c10/core/Stream.h>
#include <torch/csrc/distributed/c10d/Work.hpp>

#include <memory>
#include <vector>

#include "backend/call.h"
#include "backend/group_state.h"
#include "protocol/messenger.h"
#include "system/birthplace.h"
#include "system/callback_threads.h"

namespace mnnvl {

// A call on CPU tensors, completed by the thread that ran it.
class CpuWork final : public c10d::Work {
 public:
  // `callbacks` runs what users hang on the future; null where the work is completed before its user has it.
  CpuWork(int rank, const Call& call, std::shared_ptr<CallbackThreads> callbacks);
  // A call of messages, which may come late, behind the set-up: what the waiting thread helps along.
  void follow(std::shared_ptr<Messenger::Transfer> transfer);
  // `failure` null: success. Once. Runs no code of a user: waiters are woken first, then the future, if anybody has
  // asked for it, is completed on a callback thread. Nothing touches this work once its waiters are awake but what
  // holds it.
  void complete(std::exception_ptr failure);
  c10::intrusive_ptr<c10::ivalue::Future> getFuture() override;
  std::vector<at::Tensor> result() override { return outputs_; }
  bool wait(std::chrono::milliseconds timeout = kNoTimeout) override;
  int sourceRank() const override;

 private:
  const Birthplace birthplace_;
  const char* const name_;
  const std::vector<at::Tensor> outputs_;
  const std::shared_ptr<CallbackThreads> callbacks_;
  std::shared_ptr<Messenger::Transfer> transfer_;   // under mutex_
  c10::intrusive_ptr<c10::ivalue::Future> future_;  // made when asked for; under mutex_
  bool settled_ = false;  // somebody has undertaken to complete future_; under mutex_
};

// A call enqueued on a GPU stream; completion is an event there. In a child by fork() wait() throws and abort() does
// nothing.
class CudaWork final : public c10d::Work {
 public:
  // Where and how the call was enqueued.
  struct Place {
    c10::Stream stream;
    c10::Stream submitted;            // the caller's, on which the memory was allocated
    std::shared_ptr<c10::Event> end;  // recorded on `stream` behind the call
    bool capturing = false;
    bool blocking = false;  // wait() also holds the host until the end
    int64_t timeout_ms = 0;
  };

  // Made right after the launch, under a guard of the stream. `transport` is null for a call with nothing to send.
  CudaWork(const Call& call, Place place, std::shared_ptr<GroupState> state, std::shared_ptr<Transport> transport);
  ~CudaWork() override;
  bool isCompleted() override;
  bool isSuccess() const override;
  std::exception_ptr exception() const override;
  bool wait(std::chrono::milliseconds timeout = kNoTimeout) override;
  void synchronize() override;
  void abort() override;
  c10::intrusive_ptr<c10::ivalue::Future> getFuture() override;
  std::vector<at::Tensor> result() override { return outputs_; }

 private:
  void check() const;
  void make_done();
  void record_memory(const std::vector<at::Tensor>& tensors) const;
  void wait_on_host(std::chrono::milliseconds timeout);

  const Birthplace birthplace_;
  const char* const name_;
  const std::vector<at::Tensor> outputs_;
  const Place place_;
  const std::shared_ptr<GroupState> state_;
  const std::shared_ptr<Transport> transport_;
  // Of an asynchronous call: what its kernels touch, kept until somebody has waited for them. Who waits on the stream
  // that the call was made on needs no record of the other in the allocator, which in a capture would keep the memory
  // from every reuse.
  std::vector<at::Tensor> kept_;  // under mutex_, as is the future
  c10::intrusive_ptr<c10::ivalue::Future> future_;  // of a synchronous call made when asked for
};

// The current stream of a device; the guard's own interface, whatever the device type.
c10::Stream current_stream(c10::Device device);

}  // namespace mnnvl
