// The Work of one collective. A Work owes its user: wait(), which orders the caller's stream (GPU) or blocks (CPU) and
// raises the group's failure; a future, for DDP; isCompleted() that never blocks.
#pragma once

#include <ATen/core/ivalue.h>
#include <c10/core/Event.h>
#include <c10/core/Stream.h>
#include <torch/csrc/distributed/c10d/Work.hpp>

#include <memory>
#include <optional>
#include <vector>

#include "transport/transport.h"

namespace mnnvl {

// A collective on CPU tensors: completed by the thread that ran it.
class CpuWork final : public c10d::Work {
 public:
  CpuWork(int rank, c10d::OpType op, const std::vector<at::Tensor>& inputs, std::vector<at::Tensor> outputs);
  // `failure` null: success. Once.
  void complete(std::exception_ptr failure);
  c10::intrusive_ptr<c10::ivalue::Future> getFuture() override { return future_; }
  std::vector<at::Tensor> result() override { return outputs_; }
  bool wait(std::chrono::milliseconds timeout = kNoTimeout) override;

 private:
  std::vector<at::Tensor> outputs_;
  c10::intrusive_ptr<c10::ivalue::Future> future_;
};

// A collective enqueued on a GPU stream; completion is an event there.
class CudaWork final : public c10d::Work {
 public:
  // Made right after the launch, under a guard of `stream`, on which `end` has just been recorded. `blocking`: wait() also holds the host until the end.
  CudaWork(int rank, c10d::OpType op, const std::vector<at::Tensor>& inputs, std::vector<at::Tensor> outputs,
           c10::Stream stream, std::shared_ptr<c10::Event> end, std::shared_ptr<Transport> transport, bool capturing,
           bool blocking, int64_t timeout_ms);
  bool isCompleted() override;
  bool isSuccess() const override;
  std::exception_ptr exception() const override;
  bool wait(std::chrono::milliseconds timeout = kNoTimeout) override;
  void synchronize() override;
  void abort() override { transport_->abort(); }
  c10::intrusive_ptr<c10::ivalue::Future> getFuture() override { return future_; }
  std::vector<at::Tensor> result() override { return outputs_; }

 private:
  void wait_on_host(std::chrono::milliseconds timeout);

  std::vector<at::Tensor> outputs_;
  c10::Stream stream_;
  std::shared_ptr<c10::Event> end_;
  std::shared_ptr<Transport> transport_;
  bool capturing_, blocking_;
  int64_t timeout_ms_;
  c10::intrusive_ptr<c10::ivalue::Future> future_;
};

// The current stream of a device; the guard's own interface, whatever the device type.
c10::Stream current_stream(c10::Device device);

}  // namespace mnnvl
