// The c10d backend "mnnvl". One object serves CPU and CUDA tensors; the transport of a device type is made by the first
// collective on it (collectively, over the group's store), or by eagerConnectSingleDevice().
#pragma once

#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/distributed/c10d/Store.hpp>

#include <atomic>
#include <memory>
#include <mutex>

#include "backend/cpu_queue.h"
#include "backend/stream_order.h"
#include "transport/transport.h"
#include "backend/work.h"

namespace mnnvl {

class ProcessGroupMNNVL final : public c10d::Backend {
 public:
  struct Options : c10d::Backend::Options {
    explicit Options(std::chrono::milliseconds timeout) : c10d::Backend::Options("mnnvl", timeout) {}
    TransportOptions transport;
    bool blocking_wait = false;  // wait() of GPU works holds the host, so that failures raise where they happen
  };

  ProcessGroupMNNVL(c10::intrusive_ptr<c10d::Store> store, int rank, int size, c10::intrusive_ptr<Options> options);
  ~ProcessGroupMNNVL() override;

  const std::string getBackendName() const override { return "mnnvl"; }
  c10::intrusive_ptr<c10d::Backend::Options> getBackendOptions() override { return options_; }
  c10::intrusive_ptr<Options> options() const { return options_; }

  c10::intrusive_ptr<c10d::Work> allreduce(std::vector<at::Tensor>& tensors,
                                           const c10d::AllreduceOptions& opts = {}) override;
  c10::intrusive_ptr<c10d::Work> allreduce_coalesced(std::vector<at::Tensor>& tensors,
                                                     const c10d::AllreduceCoalescedOptions& opts = {}) override;
  // Refused like any sparse tensor, with the same error on every device type.
  c10::intrusive_ptr<c10d::Work> allreduce_sparse(std::vector<at::Tensor>& tensors,
                                                  const c10d::AllreduceOptions& opts = {}) override {
    return allreduce(tensors, opts);
  }
  c10::intrusive_ptr<c10d::Work> broadcast(std::vector<at::Tensor>& tensors,
                                           const c10d::BroadcastOptions& opts = {}) override;
  c10::intrusive_ptr<c10d::Work> allgather(std::vector<std::vector<at::Tensor>>& outputs,
                                           std::vector<at::Tensor>& inputs,
                                           const c10d::AllgatherOptions& opts = {}) override;
  c10::intrusive_ptr<c10d::Work> _allgather_base(at::Tensor& output, at::Tensor& input,
                                                 const c10d::AllgatherOptions& opts = {}) override;
  c10::intrusive_ptr<c10d::Work> allgather_into_tensor_coalesced(std::vector<at::Tensor>& outputs,
                                                                 std::vector<at::Tensor>& inputs,
                                                                 const c10d::AllgatherOptions& opts = {}) override;
  c10::intrusive_ptr<c10d::Work> barrier(const c10d::BarrierOptions& opts = {}) override;

  // Splitting makes a new group over the same store; nothing of the parent is shared.
  bool supportsSplitting() const override { return true; }
  c10::intrusive_ptr<c10d::Backend> split(const c10::intrusive_ptr<c10d::Store>& store, const std::vector<int>& ranks,
                                          const c10::intrusive_ptr<c10d::Backend::Options>& opts) override;
  void eagerConnectSingleDevice(at::Device device) override;
  void setTimeout(std::chrono::milliseconds timeout) override;
  void setSequenceNumberForGroup() override {}
  uint64_t getSequenceNumberForGroup() override { return sequence_; }
  c10d::ErrorType getError() override;

  // Ends every wait of this rank and, through the abort words, of its peers. Idempotent, any thread.
  void abort() override;
  // Waits for what was enqueued, then releases all. Idempotent. Later collectives raise.
  void shutdown() override;

 private:
  // Checks the arguments; what it returns fails only for reasons of the group, or for want of memory.
  Body reduce_body(const at::Tensor& tensor, const c10d::ReduceOp& reduce_op);
  c10::intrusive_ptr<c10d::Work> reduce_all(c10d::OpType op, std::vector<at::Tensor>& tensors,
                                            const c10d::AllreduceOptions& opts);
  c10::intrusive_ptr<c10d::Work> gather_into_tensors(c10d::OpType op, std::vector<at::Tensor>& outputs,
                                                     std::vector<at::Tensor>& inputs,
                                                     const c10d::AllgatherOptions& opts);

  std::shared_ptr<Transport> transport_for(at::Device device);
  // Under mutex_: the transport of a device type, null before its set-up. Throws if the group is shut down, aborted, or has
  // failed on any device type: a group is broken as a whole.
  std::shared_ptr<Transport> usable_transport(at::Device device);
  c10::intrusive_ptr<c10d::Work> run(c10d::OpType op, at::Device device, bool async, std::vector<at::Tensor> inputs,
                                     std::vector<at::Tensor> outputs, Body body);
  c10::intrusive_ptr<c10d::Work> run_on_cpu(c10d::OpType op, bool async, std::vector<at::Tensor> inputs,
                                            std::vector<at::Tensor> outputs, std::shared_ptr<Transport> transport,
                                            Body body);
  c10::intrusive_ptr<c10d::Work> run_on_cuda(c10d::OpType op, at::Device device, bool async,
                                             std::vector<at::Tensor> inputs, std::vector<at::Tensor> outputs,
                                             std::shared_ptr<Transport> transport, const Body& body);
  at::Device barrier_device(const c10d::BarrierOptions& opts);

  c10::intrusive_ptr<c10d::Store> store_;
  c10::intrusive_ptr<Options> options_;
  std::atomic<uint64_t> sequence_{0};

  // CPU, CUDA: held through a set-up, which may take until the timeout; taken before mutex_.
  std::mutex setup_mutex_[2];
  std::mutex mutex_;  // what follows; held briefly, so that abort() never waits for a set-up
  std::atomic<bool> aborted_{false};
  bool closed_ = false, broken_ = false;
  std::shared_ptr<Transport> cpu_, cuda_;
  std::optional<at::Device> cuda_device_;

  std::mutex cuda_mutex_;  // order of enqueuing
  StreamOrder stream_order_;
  std::optional<c10::Stream> async_stream_;  // for async_op=True

  std::shared_ptr<CpuQueue> cpu_queue_ = std::make_shared<CpuQueue>();
};

}  // namespace mnnvl
