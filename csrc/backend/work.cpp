#include "backend/work.h"

#include <c10/core/StreamGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <thread>

#include "backend/errors.h"

namespace mnnvl {
namespace {

constexpr int64_t kKernelGraceMs = 2000;

c10::intrusive_ptr<c10::ivalue::Future> make_future(std::vector<c10::Device> devices) {
  return c10::make_intrusive<c10::ivalue::Future>(c10::ListType::create(c10::TensorType::get()), std::move(devices));
}

}  // namespace

c10::Stream current_stream(c10::Device device) { return c10::impl::VirtualGuardImpl(device.type()).getStream(device); }

CpuWork::CpuWork(int rank, c10d::OpType op, const std::vector<at::Tensor>& inputs, std::vector<at::Tensor> outputs)
    : Work(rank, op, "mnnvl", inputs), outputs_(std::move(outputs)), future_(make_future({})) {}

void CpuWork::complete(std::exception_ptr failure) {
  if (failure) {
    future_->setError(failure);
  } else {
    future_->markCompleted(c10::IValue(outputs_));
  }
  finish(failure);
}

bool CpuWork::wait(std::chrono::milliseconds timeout) {
  std::unique_lock<std::mutex> lock(mutex_);
  if (timeout == kNoTimeout) {
    cv_.wait(lock, [this] { return completed_; });
  } else if (!cv_.wait_for(lock, timeout, [this] { return completed_; })) {
    C10_THROW_ERROR(DistBackendError, str("mnnvl: ", c10d::opTypeToString(opType_), " on rank ", rank_,
                                          " did not end within ", timeout.count(), " ms"));
  }
  if (exception_) std::rethrow_exception(exception_);
  return true;
}

CudaWork::CudaWork(int rank, c10d::OpType op, const std::vector<at::Tensor>& inputs, std::vector<at::Tensor> outputs,
                   c10::Stream stream, std::shared_ptr<c10::Event> end, std::shared_ptr<Transport> transport,
                   bool capturing, bool blocking, int64_t timeout_ms)
    : Work(rank, op, "mnnvl", inputs),
      outputs_(std::move(outputs)),
      stream_(stream),
      end_(std::move(end)),
      transport_(std::move(transport)),
      capturing_(capturing),
      blocking_(blocking),
      timeout_ms_(timeout_ms),
      future_(make_future({stream.device()})) {
  // The future records the end on the current stream, which the caller has made this work's.
  future_->markCompleted(c10::IValue(outputs_));
  // For the profiler the call ends here; its kernels are in the trace by themselves.
  if (recordFunctionEndCallback_) {
    recordFunctionEndCallback_();
    recordFunctionEndCallback_ = nullptr;
  }
}

bool CudaWork::isCompleted() { return !capturing_ && end_->query(); }

bool CudaWork::isSuccess() const { return exception() == nullptr; }

std::exception_ptr CudaWork::exception() const {
  try {
    at_torch_boundary([&] { transport_->check(); });
  } catch (...) {
    return std::current_exception();
  }
  return nullptr;
}

void CudaWork::synchronize() {
  const c10::Stream current = current_stream(stream_.device());
  if (current != stream_) current.wait(*end_);
}

bool CudaWork::wait(std::chrono::milliseconds timeout) {
  synchronize();
  if (capturing_) return true;
  if (blocking_ || timeout != kNoTimeout) wait_on_host(timeout);
  at_torch_boundary([&] { transport_->check(); });
  return true;
}

void CudaWork::wait_on_host(std::chrono::milliseconds timeout) {
  // With the group's own timeout the kernel gives up by itself, and says whom it waited for; it only started later.
  const auto limit = timeout == kNoTimeout ? std::chrono::milliseconds(timeout_ms_ + kKernelGraceMs) : timeout;
  const auto deadline = std::chrono::steady_clock::now() + limit;
  for (int polls = 0; !end_->query(); ++polls) {
    if (std::chrono::steady_clock::now() > deadline) {
      at_torch_boundary([&] { transport_->check(); });
      C10_THROW_ERROR(DistBackendError, str("mnnvl: ", c10d::opTypeToString(opType_), " on rank ", rank_,
                                            " did not end within ", limit.count(), " ms"));
    }
    if (polls > 1000) std::this_thread::sleep_for(std::chrono::microseconds(100));
  }
}

}  // namespace mnnvl
