#include "backend/cuda_queue.h"

#include <c10/core/StreamGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <c10/util/Exception.h>

#include <thread>

namespace mnnvl {

CudaQueue::CudaQueue(std::shared_ptr<Transport> transport, at::Device device)
    : device_(device), transport_(std::move(transport)) {}

CudaQueue::~CudaQueue() {
  if (captured_ && !closed_) (void)new std::shared_ptr<Transport>(transport_);  // never released
}

void CudaQueue::enqueue(bool async, const Work& work, const Then& then) {
  std::lock_guard<std::mutex> lock(mutex_);
  TORCH_CHECK_WITH(DistBackendError, !closed_, "mnnvl: this group has been shut down");
  const c10::impl::VirtualGuardImpl guard(device_.type());
  const c10::Stream current = guard.getStream(device_);
  c10::Stream stream = current;
  if (async) {
    if (!async_stream_) async_stream_ = guard.getStreamFromGlobalPool(device_, /*isHighPriority=*/true);
    stream = *async_stream_;
    c10::Event ready(device_.type());
    ready.record(current);
    stream.wait(ready);
  }
  const c10::StreamGuard stream_guard(stream);
  const bool capturing = order_.enter(stream);
  captured_ = captured_ || capturing;
  // What was launched before a failure is in flight like any other: later calls come behind it, and `then` holds its
  // memory.
  std::exception_ptr failure;
  try {
    work(stream.native_handle());
  } catch (...) {
    failure = std::current_exception();
  }
  auto end = std::make_shared<c10::Event>(device_.type());
  end->record(stream);
  order_.leave(stream, end);
  then({stream, current, std::move(end), capturing});
  if (failure) std::rethrow_exception(failure);
}

bool CudaQueue::wait_idle(std::chrono::milliseconds timeout) {
  const auto deadline = std::chrono::steady_clock::now() + timeout;
  for (;;) {
    {
      // Whoever launches may be held up by a full queue of the device.
      const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
      if (lock && (closed_ || order_.idle())) return true;
    }
    if (std::chrono::steady_clock::now() >= deadline) return false;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
}

void CudaQueue::close() {
  std::lock_guard<std::mutex> lock(mutex_);
  closed_ = true;
  transport_->close();
}

}  // namespace mnnvl
