#include "backend/process_group.h"

#include <c10/core/DeviceGuard.h>
#include <c10/core/StreamGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include "backend/errors.h"
#include "backend/generic_reduce.h"
#include "backend/store_exchange.h"
#include "backend/tensors.h"
#include "backend/work.h"
#include "kernels/kernels.h"

namespace mnnvl {
namespace {

// The collective is over as soon as it begins: nothing to send.
c10::intrusive_ptr<CpuWork> completed_work(int rank, c10d::OpType op, std::vector<at::Tensor> outputs) {
  auto work = c10::make_intrusive<CpuWork>(rank, op, outputs, outputs);
  work->complete(nullptr);
  return work;
}

// Several collectives as one work.
Body in_turn(std::vector<Body> bodies) {
  if (bodies.size() == 1) return std::move(bodies[0]);
  return [bodies = std::move(bodies)](Transport& transport, void* stream) {
    for (const Body& body : bodies) body(transport, stream);
  };
}

}  // namespace

ProcessGroupMNNVL::ProcessGroupMNNVL(c10::intrusive_ptr<c10d::Store> store, int rank, int size,
                                     c10::intrusive_ptr<Options> options)
    : Backend(rank, size), store_(std::move(store)), options_(std::move(options)) {
  TORCH_CHECK_VALUE(size >= 1 && size <= kMaxWorldSize, "mnnvl: world size: expected 1 to ", kMaxWorldSize, ", got ",
                    size);
  TORCH_CHECK_VALUE(rank >= 0 && rank < size, "mnnvl: rank: expected 0 to ", size - 1, ", got ", rank);
  TORCH_CHECK_VALUE(options_->timeout.count() > 0, "mnnvl: timeout: expected more than 0 ms, got ",
                    options_->timeout.count());
  options_->transport.timeout_ms = options_->timeout.count();
}

ProcessGroupMNNVL::~ProcessGroupMNNVL() {
  try {
    shutdown();
  } catch (const std::exception& error) {
    TORCH_WARN("mnnvl: ", error.what());
  }
}

std::shared_ptr<Transport> ProcessGroupMNNVL::usable_transport(at::Device device) {
  TORCH_CHECK_WITH(DistBackendError, !closed_, "mnnvl: this process group has been shut down");
  try {
    for (const auto& transport : {cpu_, cuda_}) {
      if (transport) transport->check();
    }
  } catch (const Error&) {
    // Peers may wait for this rank on the other device type, where nothing has failed yet.
    if (!std::exchange(broken_, true)) {
      for (const auto& transport : {cpu_, cuda_}) {
        if (transport) transport->abort();
      }
    }
    throw;
  }
  if (aborted_) fail(ErrorKind::kAborted, "mnnvl: abort() was called on this process group on rank ", rank_);
  if (device.is_cpu()) return cpu_;
  TORCH_CHECK_VALUE(!cuda_device_ || *cuda_device_ == device, "mnnvl: this rank of the group uses ", *cuda_device_,
                    ", got a tensor on ", device, "; a rank has one GPU");
  return cuda_;
}

std::shared_ptr<Transport> ProcessGroupMNNVL::transport_for(at::Device device) {
  const auto existing = [&] {
    std::lock_guard<std::mutex> lock(mutex_);
    return usable_transport(device);
  };
  if (auto transport = existing()) return transport;
  TORCH_CHECK(
      device.is_cpu() || !kernels::capture_id(current_stream(device).native_handle()),
      "mnnvl: the first collective on a GPU sets the group up, which can't be captured: make one call before the "
      "capture, or give init_process_group a device_id");
  const int kind = device.is_cpu() ? 0 : 1;
  std::lock_guard<std::mutex> setup_lock(setup_mutex_[kind]);
  if (auto transport = existing()) return transport;

  // Numbered in the store, which may outlive this object: neither a retry nor a later group of the same name may read the
  // keys of an earlier set-up.
  const std::string prefix = str("mnnvl/", kind == 0 ? "cpu" : "cuda");
  const int64_t attempt = store_->add(str(prefix, "/attempts/", rank_), 1);
  StoreExchange exchange(store_, str(prefix, attempt), rank_, size_, options_->timeout, aborted_);
  std::shared_ptr<Transport> made;
  if (device.is_cpu()) {
    made = make_cpu_transport(exchange, options_->transport);
  } else {
    const c10::DeviceGuard guard(device);
    made = make_cuda_transport(exchange, device.index(), options_->transport);
  }
  std::lock_guard<std::mutex> lock(mutex_);
  if (aborted_ || closed_) made->abort();  // meanwhile; the peers believe in it
  (void)usable_transport(device);
  if (device.is_cpu()) {
    cpu_ = made;
  } else {
    cuda_ = made;
    cuda_device_ = device;
  }
  return made;
}

c10::intrusive_ptr<c10d::Work> ProcessGroupMNNVL::run(c10d::OpType op, at::Device device, bool async,
                                                      std::vector<at::Tensor> inputs, std::vector<at::Tensor> outputs,
                                                      Body body) {
  return at_torch_boundary([&]() -> c10::intrusive_ptr<c10d::Work> {
    std::shared_ptr<Transport> transport = transport_for(device);
    ++sequence_;
    if (device.is_cpu()) {
      return run_on_cpu(op, async, std::move(inputs), std::move(outputs), std::move(transport), std::move(body));
    }
    return run_on_cuda(op, device, async, std::move(inputs), std::move(outputs), std::move(transport), body);
  });
}

c10::intrusive_ptr<c10d::Work> ProcessGroupMNNVL::run_on_cuda(c10d::OpType op, at::Device device, bool async,
                                                              std::vector<at::Tensor> inputs,
                                                              std::vector<at::Tensor> outputs,
                                                              std::shared_ptr<Transport> transport, const Body& body) {
  std::lock_guard<std::mutex> lock(cuda_mutex_);
  const c10::impl::VirtualGuardImpl guard(device.type());
  const c10::Stream current = guard.getStream(device);
  c10::Stream stream = current;
  if (async) {
    if (!async_stream_) async_stream_ = guard.getStreamFromGlobalPool(device, /*isHighPriority=*/true);
    stream = *async_stream_;
    c10::Event ready(device.type());
    ready.record(current);
    stream.wait(ready);
  }
  c10::StreamGuard stream_guard(stream);
  const bool capturing = stream_order_.enter(stream);
  run_body(body, *transport, stream.native_handle());
  auto end = std::make_shared<c10::Event>(device.type());
  end->record(stream);
  stream_order_.leave(stream, end);
  if (async) {
    for (const auto* list : {&inputs, &outputs}) {
      for (const at::Tensor& tensor : *list) guard.recordDataPtrOnStream(tensor.storage().data_ptr(), stream);
    }
  }
  const bool blocking = options_->blocking_wait || op == c10d::OpType::BARRIER;
  return c10::make_intrusive<CudaWork>(rank_, op, inputs, std::move(outputs), stream, std::move(end),
                                       std::move(transport), capturing, blocking, options_->transport.timeout_ms);
}

c10::intrusive_ptr<c10d::Work> ProcessGroupMNNVL::run_on_cpu(c10d::OpType op, bool async,
                                                             std::vector<at::Tensor> inputs,
                                                             std::vector<at::Tensor> outputs,
                                                             std::shared_ptr<Transport> transport, Body body) {
  auto work = c10::make_intrusive<CpuWork>(rank_, op, inputs, std::move(outputs));
  cpu_queue_->submit({work, std::move(inputs), std::move(transport), std::move(body)}, async);
  return work;
}

Body ProcessGroupMNNVL::reduce_body(const at::Tensor& tensor, const c10d::ReduceOp& reduce_op) {
  const std::optional<Dtype> dtype = kernel_dtype(tensor);
  const std::optional<ReduceOp> op = kernel_op(reduce_op);
  if (dtype && op) {
    return [data = tensor.data_ptr(), numel = tensor.numel(), dtype = *dtype, op = *op](Transport& transport,
                                                                                        void* stream) {
      transport.all_reduce(data, data, numel, dtype, op, Strategy::kAuto, /*pdl=*/false, stream);
    };
  }
  check_generic_reduce(tensor, reduce_op);
  return [tensor, op = reduce_op.op_, size = size_](Transport& transport, void* stream) {
    generic_all_reduce(transport, tensor, op, size, stream);
  };
}

c10::intrusive_ptr<c10d::Work> ProcessGroupMNNVL::allreduce(std::vector<at::Tensor>& tensors,
                                                            const c10d::AllreduceOptions& opts) {
  check_single(tensors, "all_reduce");
  return reduce_all(c10d::OpType::ALLREDUCE, tensors, opts);
}

c10::intrusive_ptr<c10d::Work> ProcessGroupMNNVL::allreduce_coalesced(std::vector<at::Tensor>& tensors,
                                                                      const c10d::AllreduceCoalescedOptions& opts) {
  for (const at::Tensor& tensor : tensors) {
    check_dense(tensor, "all_reduce_coalesced", "tensors");
    check_same_device(tensor, tensors[0], "all_reduce_coalesced", "tensors");
  }
  return reduce_all(c10d::OpType::ALLREDUCE_COALESCED, tensors, opts);
}

c10::intrusive_ptr<c10d::Work> ProcessGroupMNNVL::reduce_all(c10d::OpType op, std::vector<at::Tensor>& tensors,
                                                             const c10d::AllreduceOptions& opts) {
  std::vector<Body> bodies;
  for (const at::Tensor& tensor : tensors) {
    Body body = reduce_body(tensor, opts.reduceOp);
    if (tensor.numel() > 0) bodies.push_back(std::move(body));
  }
  if (size_ == 1 || bodies.empty()) return completed_work(rank_, op, tensors);
  return run(op, tensors[0].device(), opts.asyncOp, tensors, tensors, in_turn(std::move(bodies)));
}

c10::intrusive_ptr<c10d::Work> ProcessGroupMNNVL::broadcast(std::vector<at::Tensor>& tensors,
                                                            const c10d::BroadcastOptions& opts) {
  check_single(tensors, "broadcast");
  const at::Tensor& tensor = tensors[0];
  TORCH_CHECK_VALUE(opts.rootRank >= 0 && opts.rootRank < size_, "mnnvl broadcast: root: expected 0 to ", size_ - 1,
                    ", got ", opts.rootRank);
  if (size_ == 1 || tensor.numel() == 0) return completed_work(rank_, c10d::OpType::BROADCAST, tensors);
  return run(c10d::OpType::BROADCAST, tensor.device(), opts.asyncOp, tensors, tensors,
             [data = tensor.data_ptr(), bytes = int64_t(tensor.nbytes()), root = int(opts.rootRank)](
                 Transport& transport, void* stream) { transport.broadcast(data, bytes, root, stream); });
}

c10::intrusive_ptr<c10d::Work> ProcessGroupMNNVL::allgather(std::vector<std::vector<at::Tensor>>& outputs,
                                                            std::vector<at::Tensor>& inputs,
                                                            const c10d::AllgatherOptions& opts) {
  check_single(inputs, "all_gather");
  const at::Tensor input = inputs[0].contiguous();
  TORCH_CHECK_VALUE(outputs.size() == 1 && outputs[0].size() == size_t(size_),
                    "mnnvl all_gather: tensor_list: expected ", size_, " tensors, got ",
                    outputs.empty() ? 0 : outputs[0].size());
  std::vector<at::Tensor>& wanted = outputs[0];
  std::vector<at::Tensor> landing;  // where contributions land: the output itself unless it isn't contiguous
  for (const at::Tensor& output : wanted) {
    TORCH_CHECK_VALUE(output.layout() == at::kStrided, "mnnvl all_gather: tensor_list: expected dense tensors");
    check_same(output, input, "all_gather", "tensor_list");
    TORCH_CHECK_VALUE(output.numel() == input.numel(), "mnnvl all_gather: tensor_list: expected tensors of ",
                      input.numel(), " elements like the input, got ", output.numel());
    landing.push_back(output.is_contiguous() ? output : at::empty_like(output, at::MemoryFormat::Contiguous));
  }
  if (size_ == 1) {
    wanted[0].copy_(input);
    return completed_work(rank_, c10d::OpType::ALLGATHER, wanted);
  }
  if (input.numel() == 0) return completed_work(rank_, c10d::OpType::ALLGATHER, wanted);
  std::vector<at::Tensor> kept{input};
  kept.insert(kept.end(), landing.begin(), landing.end());
  return run(c10d::OpType::ALLGATHER, input.device(), opts.asyncOp, std::move(kept), wanted,
             [input, landing, wanted](Transport& transport, void* stream) {
               std::vector<void*> outs;
               for (const at::Tensor& tensor : landing) outs.push_back(tensor.data_ptr());
               transport.all_gather(input.data_ptr(), outs.data(), int64_t(input.nbytes()), stream);
               for (size_t i = 0; i < wanted.size(); ++i) {
                 if (!wanted[i].is_same(landing[i])) at::Tensor(wanted[i]).copy_(landing[i], /*non_blocking=*/true);
               }
             });
}

c10::intrusive_ptr<c10d::Work> ProcessGroupMNNVL::_allgather_base(at::Tensor& output, at::Tensor& input,
                                                                  const c10d::AllgatherOptions& opts) {
  std::vector<at::Tensor> outputs{output}, inputs{input};
  return gather_into_tensors(c10d::OpType::_ALLGATHER_BASE, outputs, inputs, opts);
}

c10::intrusive_ptr<c10d::Work> ProcessGroupMNNVL::allgather_into_tensor_coalesced(std::vector<at::Tensor>& outputs,
                                                                                  std::vector<at::Tensor>& inputs,
                                                                                  const c10d::AllgatherOptions& opts) {
  TORCH_CHECK_VALUE(outputs.size() == inputs.size(), "mnnvl all_gather_into_tensor_coalesced: outputs: expected ",
                    inputs.size(), " tensors like the inputs, got ", outputs.size());
  return gather_into_tensors(c10d::OpType::ALLGATHER_COALESCED, outputs, inputs, opts);
}

c10::intrusive_ptr<c10d::Work> ProcessGroupMNNVL::gather_into_tensors(c10d::OpType op, std::vector<at::Tensor>& outputs,
                                                                      std::vector<at::Tensor>& inputs,
                                                                      const c10d::AllgatherOptions& opts) {
  std::vector<Body> bodies;
  for (size_t i = 0; i < inputs.size(); ++i) {
    const at::Tensor &input = inputs[i], &output = outputs[i];
    check_dense(input, "all_gather_into_tensor", "input");
    check_dense(output, "all_gather_into_tensor", "output");
    check_same_device(input, inputs[0], "all_gather_into_tensor", "input");
    check_same(output, input, "all_gather_into_tensor", "output");
    TORCH_CHECK_VALUE(output.is_contiguous() && input.is_contiguous(),
                      "mnnvl all_gather_into_tensor: expected contiguous tensors");
    TORCH_CHECK_VALUE(output.numel() == input.numel() * size_, "mnnvl all_gather_into_tensor: output: expected ",
                      input.numel() * size_, " elements, got ", output.numel());
    if (input.numel() == 0) continue;
    bodies.push_back([in = input.data_ptr(), out = static_cast<std::byte*>(output.data_ptr()),
                      bytes = int64_t(input.nbytes()), size = size_](Transport& transport, void* stream) {
      std::vector<void*> outs;
      for (int r = 0; r < size; ++r) outs.push_back(out + r * bytes);
      transport.all_gather(in, outs.data(), bytes, stream);
    });
  }
  if (size_ == 1) {
    for (size_t i = 0; i < inputs.size(); ++i) outputs[i].view(-1).copy_(inputs[i].view(-1));
  }
  if (size_ == 1 || bodies.empty()) return completed_work(rank_, op, outputs);
  std::vector<at::Tensor> kept(inputs);
  kept.insert(kept.end(), outputs.begin(), outputs.end());
  return run(op, inputs[0].device(), opts.asyncOp, std::move(kept), outputs, in_turn(std::move(bodies)));
}

at::Device ProcessGroupMNNVL::barrier_device(const c10d::BarrierOptions& opts) {
  if (opts.device && (!opts.device->is_cuda() || opts.device->has_index())) return *opts.device;
  if (!opts.device_ids.empty()) return at::Device(at::kCUDA, at::DeviceIndex(opts.device_ids[0]));
  if (getBoundDeviceId()) return *getBoundDeviceId();
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (cuda_device_) return *cuda_device_;  // torch asks for "cuda" without an index where nobody bound a device
  }
  return opts.device ? c10::impl::VirtualGuardImpl(opts.device->type()).getDevice() : at::Device(at::kCPU);
}

c10::intrusive_ptr<c10d::Work> ProcessGroupMNNVL::barrier(const c10d::BarrierOptions& opts) {
  if (size_ == 1) return completed_work(rank_, c10d::OpType::BARRIER, {});
  return run(c10d::OpType::BARRIER, barrier_device(opts), opts.asyncOp, {}, {},
             [](Transport& transport, void* stream) { transport.barrier(stream); });
}

c10::intrusive_ptr<c10d::Backend> ProcessGroupMNNVL::split(const c10::intrusive_ptr<c10d::Store>& store,
                                                           const std::vector<int>& ranks,
                                                           const c10::intrusive_ptr<c10d::Backend::Options>& opts) {
  const auto mine = std::find(ranks.begin(), ranks.end(), rank_);
  if (mine == ranks.end()) return nullptr;
  auto options = c10::make_intrusive<Options>(opts ? opts->timeout : options_->timeout);
  options->transport = options_->transport;
  options->blocking_wait = options_->blocking_wait;
  return c10::make_intrusive<ProcessGroupMNNVL>(store, int(mine - ranks.begin()), int(ranks.size()), options);
}

void ProcessGroupMNNVL::eagerConnectSingleDevice(at::Device device) {
  if (size_ > 1) at_torch_boundary([&] { transport_for(device); });
}

void ProcessGroupMNNVL::setTimeout(std::chrono::milliseconds timeout) {
  TORCH_CHECK_VALUE(timeout.count() > 0, "mnnvl: timeout: expected more than 0 ms, got ", timeout.count());
  std::lock_guard<std::mutex> lock(mutex_);
  options_->timeout = timeout;
  options_->transport.timeout_ms = timeout.count();
  for (const auto& transport : {cpu_, cuda_}) {
    if (transport) transport->set_timeout(timeout.count());
  }
}

c10d::ErrorType ProcessGroupMNNVL::getError() {
  std::lock_guard<std::mutex> lock(mutex_);
  for (const auto& transport : {cpu_, cuda_}) {
    if (!transport) continue;
    try {
      transport->check();
    } catch (const Error& error) {
      return error.kind() == ErrorKind::kTimeout      ? c10d::ErrorType::TIMEOUT
             : error.kind() == ErrorKind::kPeerFailed ? c10d::ErrorType::REMOTE_ERROR
                                                      : c10d::ErrorType::COMM_ERROR;
    }
  }
  return c10d::ErrorType::SUCCESS;
}

void ProcessGroupMNNVL::abort() {
  aborted_ = true;
  std::lock_guard<std::mutex> lock(mutex_);
  for (const auto& transport : {cpu_, cuda_}) {
    if (transport) transport->abort();
  }
}

void ProcessGroupMNNVL::shutdown() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    closed_ = true;
  }
  cpu_queue_->stop();
  std::shared_ptr<Transport> cpu, cuda;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    cpu.swap(cpu_);
    cuda.swap(cuda_);
  }
  // Works still held by the user keep the objects, to ask them about failures, but not their memory.
  for (const auto& transport : {cpu, cuda}) {
    if (transport) transport->close();
  }
}

}  // namespace mnnvl
