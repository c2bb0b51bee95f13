// The c10d backend "mnnvl". One object serves CPU and CUDA tensors; the transport of a device type is made by the first
// collective on it (collectively, over the group's store; on the CPU behind it, if it is asynchronous), or by
// eagerConnectSingleDevice(). Each operation is one line: collectives/ checks its arguments and makes the Call, run()
// does the rest for all of them.
#pragma once

#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/distributed/c10d/Store.hpp>

#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "backend/coalescing.h"
#include "backend/collectives/collectives.h"
#include "backend/cpu_queue.h"
#include "backend/cpu_set_up.h"
#include "backend/cuda_queue.h"
#include "backend/group_state.h"
#include "backend/work.h"
#include "system/birthplace.h"

namespace mnnvl {

class ProcessGroupMNNVL final : public c10d::Backend {
 public:
  struct Options : c10d::Backend::Options {
    explicit Options(std::chrono::milliseconds timeout) : c10d::Backend::Options("mnnvl", timeout) {}
    TransportOptions transport;
    bool blocking_wait = false;  // wait() of GPU works holds the host, so that failures raise where they happen
  };
  using WorkPtr = c10::intrusive_ptr<c10d::Work>;
  using Tensors = std::vector<at::Tensor>;

  ProcessGroupMNNVL(c10::intrusive_ptr<c10d::Store> store, int rank, int size, c10::intrusive_ptr<Options> options);
  // Waits for no CPU work, whose threads are left to end by themselves, and for GPU work by its deadline. To be called
  // without the GIL.
  ~ProcessGroupMNNVL() override;

  const std::string getBackendName() const override { return "mnnvl"; }
  c10::intrusive_ptr<c10d::Backend::Options> getBackendOptions() override { return options_; }
  c10::intrusive_ptr<Options> options() const { return options_; }

  WorkPtr allreduce(Tensors& tensors, const c10d::AllreduceOptions& opts = {}) override {
    return run(collectives::all_reduce(view(), tensors, opts));
  }
  WorkPtr allreduce_coalesced(Tensors& tensors, const c10d::AllreduceCoalescedOptions& opts = {}) override {
    return run(collectives::all_reduce_coalesced(view(), tensors, opts));
  }
  // Refused like any sparse tensor, with the same error on every device type.
  WorkPtr allreduce_sparse(Tensors& tensors, const c10d::AllreduceOptions& opts = {}) override {
    return allreduce(tensors, opts);
  }
  WorkPtr broadcast(Tensors& tensors, const c10d::BroadcastOptions& opts = {}) override {
    return run(collectives::broadcast(view(), tensors, opts));
  }
  WorkPtr reduce(Tensors& tensors, const c10d::ReduceOptions& opts = {}) override {
    return run(collectives::reduce(view(), tensors, opts));
  }
  WorkPtr reduce_scatter(Tensors& outputs, std::vector<Tensors>& inputs,
                         const c10d::ReduceScatterOptions& opts = {}) override {
    return run(collectives::reduce_scatter(view(), outputs, inputs, opts));
  }
  WorkPtr _reduce_scatter_base(at::Tensor& output, at::Tensor& input,
                               const c10d::ReduceScatterOptions& opts = {}) override {
    return run(collectives::reduce_scatter_tensor(view(), output, input, opts));
  }
  WorkPtr reduce_scatter_tensor_coalesced(Tensors& outputs, Tensors& inputs,
                                          const c10d::ReduceScatterOptions& opts = {}) override {
    return run(collectives::reduce_scatter_tensor_coalesced(view(), outputs, inputs, opts));
  }
  WorkPtr allgather(std::vector<Tensors>& outputs, Tensors& inputs, const c10d::AllgatherOptions& opts = {}) override {
    return run(collectives::all_gather(view(), outputs, inputs, opts));
  }
  WorkPtr allgather_coalesced(std::vector<Tensors>& outputs, Tensors& inputs,
                              const c10d::AllgatherOptions& opts = {}) override {
    return run(collectives::all_gather_coalesced(view(), outputs, inputs, opts));
  }
  WorkPtr _allgather_base(at::Tensor& output, at::Tensor& input, const c10d::AllgatherOptions& opts = {}) override {
    return run(collectives::all_gather_into_tensor(view(), output, input, opts));
  }
  WorkPtr allgather_into_tensor_coalesced(Tensors& outputs, Tensors& inputs,
                                          const c10d::AllgatherOptions& opts = {}) override {
    return run(collectives::all_gather_into_tensor_coalesced(view(), outputs, inputs, opts));
  }
  WorkPtr gather(std::vector<Tensors>& outputs, Tensors& inputs, const c10d::GatherOptions& opts = {}) override {
    return run(collectives::gather(view(), outputs, inputs, opts));
  }
  WorkPtr scatter(Tensors& outputs, std::vector<Tensors>& inputs, const c10d::ScatterOptions& opts = {}) override {
    return run(collectives::scatter(view(), outputs, inputs, opts));
  }
  WorkPtr alltoall(Tensors& outputs, Tensors& inputs, const c10d::AllToAllOptions& opts = {}) override {
    return run(collectives::all_to_all(view(), outputs, inputs, opts));
  }
  WorkPtr alltoall_base(at::Tensor& output, at::Tensor& input, std::vector<int64_t>& output_splits,
                        std::vector<int64_t>& input_splits, const c10d::AllToAllOptions& opts = {}) override {
    return run(collectives::all_to_all_single(view(), output, input, output_splits, input_splits, opts));
  }
  WorkPtr barrier(const c10d::BarrierOptions& opts = {}) override {
    return run(collectives::barrier(view(), bound_device(), opts));
  }
  // Through the store: it needs no transport, and the group is as usable after a failure as before. The error names all
  // ranks that didn't come in time, whatever `wait_all_ranks` says, and those that come later get it too.
  void monitoredBarrier(const c10d::BarrierOptions& opts, bool wait_all_ranks = false) override;

  WorkPtr send(Tensors& tensors, int destination, int tag) override {
    return run(collectives::send(view(), tensors, destination, tag));
  }
  WorkPtr recv(Tensors& tensors, int source, int tag) override {
    return run(collectives::recv(view(), tensors, source, tag));
  }
  WorkPtr recvAnysource(Tensors& tensors, int tag) override {
    return run(collectives::recv_any_source(view(), tensors, tag));
  }
  // Between the two, calls of this thread return no work, and begin together at the end, whose work is theirs.
  bool supportsCoalescing() const override { return true; }
  void startCoalescing() override;
  WorkPtr endCoalescing() override;

  // Splitting makes a new group over the same store; nothing of the parent is shared.
  bool supportsSplitting() const override { return true; }
  c10::intrusive_ptr<c10d::Backend> split(const c10::intrusive_ptr<c10d::Store>& store, const std::vector<int>& ranks,
                                          const c10::intrusive_ptr<c10d::Backend::Options>& opts) override;
  void eagerConnectSingleDevice(at::Device device) override;
  void setTimeout(std::chrono::milliseconds timeout) override;
  void setSequenceNumberForGroup() override {}
  uint64_t getSequenceNumberForGroup() override { return sequence_; }
  const std::shared_ptr<FlightRecorder>& recorder() const { return state_->recorder(); }
  // Since the group was made, of this rank.
  struct Stats {
    std::map<std::string, FlightRecorder::Count> operations;
    std::map<std::string, uint64_t> algorithms;  // TransportCounters, of all-reduces
    uint64_t slept;  // the same
  };
  Stats stats() const;
  c10d::ErrorType getError() override;

  // Sleep: collective, beside no call; those made between the two throw "not attached", before anything is enqueued,
  // and break nothing. Of the device types that were set up: nothing for others. A failure leaves the group usable, or
  // detached, alike on every rank. csrc/README.md, "Giving the memory back".
  int64_t release_memory();  // the bytes that this rank gave back
  void restore_memory();

  // Ends every wait of this rank and, through the abort words, of its peers. Idempotent, any thread.
  void abort() override;
  // Waits for what was enqueued, then releases all. Idempotent. Later collectives raise.
  void shutdown() override;
  // For the interpreter's end, when no thread may run Python any more: gives what is in flight `grace` to end,
  // aborts the rest, shuts down. Throws nothing.
  void finish(std::chrono::milliseconds grace) noexcept;

 private:
  GroupView view() { return {rank_, size_, coalescing_.collecting()}; }
  std::optional<at::Device> bound_device();
  // Collectives are counted, by all ranks alike; messages aren't.
  uint64_t next_sequence(const Call& call) { return call.has_messages() ? sequence_.load() : ++sequence_; }

  WorkPtr run(Call call);
  WorkPtr begin(Call&& call);
  WorkPtr run_now(Call&& call);
  WorkPtr run_here(const Call& call);
  WorkPtr run_on_cuda(const Call& call, const std::shared_ptr<CudaQueue>& queue, int64_t timeout_ms);

  // The transport of a device type: on the CPU the attempt to make it, begun if need be, by a call that `waits` for it
  // or not; on a GPU what was made, if need be now. Throws if it is detached, if the group is shut down, or if it has
  // failed on any device type.
  std::shared_ptr<CpuSetUp> cpu_set_up(bool waits);
  CpuSetUp::Make make_cpu(bool waits) const;
  std::shared_ptr<CudaQueue> cuda_queue(at::Device device);
  void set_up_cuda(at::Device device);
  void check_usable() const;
  void name_in_records();
  void on_set_up(const std::function<void(Transport&, Exchange&)>& on_cpu,
                 const std::function<void(CudaQueue&, Exchange&)>& on_cuda);

  const Birthplace birthplace_;  // in a child of it calls throw, abort() and shutdown() do nothing
  const c10::intrusive_ptr<c10d::Store> store_;
  const c10::intrusive_ptr<Options> options_;
  std::atomic<int64_t> timeout_ms_;
  int64_t owner_ = 0;  // of set-ups in the store: what a destroyed group left there is old for this one
  std::atomic<uint64_t> sequence_{0};
  std::atomic<bool> closed_{false};
  const std::shared_ptr<GroupState> state_;

  std::mutex setup_mutex_;  // held through a set-up of CUDA, which may take until the timeout; taken before mutex_
  std::mutex sleep_mutex_;  // held through release_memory() and restore_memory()
  std::mutex monitored_mutex_;  // held through a monitored barrier, of which a rank can be in one at a time
  std::mutex mutex_;  // what follows; held briefly, so that abort() never waits for a set-up
  std::shared_ptr<CpuSetUp> cpu_;
  std::shared_ptr<CudaQueue> cuda_;

  CpuQueue cpu_queue_;
  Coalescing coalescing_;
};

}  // namespace mnnvl
