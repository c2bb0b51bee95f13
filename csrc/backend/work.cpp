#include "backend/work.h"

#include <ATen/record_function.h>
#include <c10/core/StreamGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <c10/util/Logging.h>

#include <thread>

#include "backend/errors.h"
#include "system/deadline.h"

namespace mnnvl {
namespace {

constexpr int64_t kKernelGraceMs = 2000;

using Future = c10::ivalue::Future;

c10::intrusive_ptr<Future> make_future(std::vector<c10::Device> devices) {
  return c10::make_intrusive<Future>(c10::ListType::create(c10::TensorType::get()), std::move(devices));
}

void settle(Future& future, const std::vector<at::Tensor>& outputs, std::exception_ptr failure) {
  if (failure) {
    future.setError(failure);
  } else {
    future.markCompleted(c10::IValue(outputs));
  }
}

[[noreturn]] void throw_late(const char* name, int rank, std::chrono::milliseconds limit) {
  C10_THROW_ERROR(DistBackendError,
                  str("mnnvl: ", name, " on rank ", rank, " did not end within ", limit.count(), " ms"));
}

}  // namespace

c10::Stream current_stream(c10::Device device) { return c10::impl::VirtualGuardImpl(device.type()).getStream(device); }

CpuWork::CpuWork(int rank, const Call& call, std::shared_ptr<CallbackThreads> callbacks)
    : Work(rank, call.type, call.title, call.inputs),
      name_(call.name),
      outputs_(call.outputs),
      callbacks_(std::move(callbacks)) {}

void CpuWork::complete(std::exception_ptr failure) {
  finish(failure);  // ends the profiler's record before anybody can know of the end
  c10::intrusive_ptr<Future> future;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!future_ || std::exchange(settled_, true)) return;
    future = future_;
  }
  callbacks_->post([future, outputs = outputs_, failure, name = name_] {
    try {
      settle(*future, outputs, failure);
    } catch (const std::exception& error) {  // a callback's, or somebody completed the future himself
      LOG(ERROR) << "mnnvl: the future of " << name << " could not be completed: " << error.what();
    }
  });
}

c10::intrusive_ptr<Future> CpuWork::getFuture() {
  std::lock_guard<std::mutex> lock(mutex_);
  if (!future_) {
    future_ = make_future({});
    // Nobody can have hung a callback on it yet.
    if (completed_ && !std::exchange(settled_, true)) settle(*future_, outputs_, exception_);
  }
  return future_;
}

void CpuWork::follow(std::shared_ptr<Messenger::Transfer> transfer) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    transfer_ = std::move(transfer);
  }
  cv_.notify_all();
}

int CpuWork::sourceRank() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return transfer_ ? transfer_->source() : Work::sourceRank();
}

bool CpuWork::wait(std::chrono::milliseconds timeout) {
  at_torch_boundary([this] { birthplace_.check("work"); });
  const auto limit = std::chrono::milliseconds(clamp_timeout_ms(timeout == kNoTimeout ? INT64_MAX : timeout.count()));
  std::unique_lock<std::mutex> lock(mutex_);
  if (!completed_) {
    const auto until = std::chrono::steady_clock::now() + limit;
    const auto await = [&](const auto& what) {
      if (timeout == kNoTimeout) {
        cv_.wait(lock, what);
      } else if (!cv_.wait_until(lock, until, what)) {
        throw_late(name_, rank_, timeout);
      }
    };
    await([this] { return completed_ || transfer_; });
    if (const auto followed = transfer_) {
      lock.unlock();
      if (!followed->wait(until)) throw_late(name_, rank_, timeout);
      lock.lock();
    }
    await([this] { return completed_; });
  }
  if (exception_) std::rethrow_exception(exception_);
  return true;
}

CudaWork::CudaWork(const Call& call, Place place, std::shared_ptr<GroupState> state,
                   std::shared_ptr<Transport> transport)
    // Without anybody to hear of it, not even an empty record for the profiler.
    : Work(state->rank(), call.type, at::hasCallbacks() ? call.title : nullptr, call.inputs),
      name_(call.name),
      outputs_(call.outputs),
      place_(std::move(place)),
      state_(std::move(state)),
      transport_(std::move(transport)) {
  if (call.async) {
    for (const auto* list : {&call.inputs, &call.outputs, &call.landing}) {
      kept_.insert(kept_.end(), list->begin(), list->end());
    }
    make_done();
  }
  // For the profiler the call ends here; its kernels are in the trace by themselves.
  if (recordFunctionEndCallback_) {
    recordFunctionEndCallback_();
    recordFunctionEndCallback_ = nullptr;
  }
}

CudaWork::~CudaWork() {
  if (birthplace_.left()) {
    // Perhaps the last to hold them. Their ends would wait for threads that a child doesn't have.
    new std::shared_ptr<Transport>(transport_);
    new std::shared_ptr<GroupState>(state_);
    (void)future_.release();  // and its events would be destroyed in the parent's context
    return;
  }
  if (kept_.empty()) return;
  // Nobody has waited: the allocator must know of the stream that the memory is used on.
  try {
    record_memory(kept_);
  } catch (const std::exception& error) {
    TORCH_WARN("mnnvl: cannot record the memory of ", name_, " on its stream: ", error.what());
  }
}

void CudaWork::record_memory(const std::vector<at::Tensor>& tensors) const {
  const c10::impl::VirtualGuardImpl guard(place_.stream.device_type());
  for (const at::Tensor& tensor : tensors) guard.recordDataPtrOnStream(tensor.storage().data_ptr(), place_.stream);
}

bool CudaWork::isCompleted() { return !place_.capturing && place_.end->query(); }

bool CudaWork::isSuccess() const { return exception() == nullptr; }

// The group's first cause goes before what its transport says, which may be but a consequence.
void CudaWork::check() const {
  at_torch_boundary([this] {
    birthplace_.check("work");
    state_->check();
    if (transport_) transport_->check();
  });
}

void CudaWork::abort() {
  if (transport_ && !birthplace_.left()) transport_->abort(FailureCause::kLocalAbort);
}

std::exception_ptr CudaWork::exception() const {
  try {
    check();
  } catch (...) {
    return std::current_exception();
  }
  return nullptr;
}

// The future records the end on the current stream. Later it would wait for what came meanwhile, too, which may be a
// message that needs it; of a synchronous call, on the caller's own stream, nobody asks for it.
void CudaWork::make_done() {
  future_ = make_future({place_.stream.device()});
  future_->markCompleted(c10::IValue(outputs_));
}

c10::intrusive_ptr<Future> CudaWork::getFuture() {
  at_torch_boundary([this] { birthplace_.check("work"); });
  std::lock_guard<std::mutex> lock(mutex_);
  if (!future_) {
    const c10::StreamGuard guard(place_.stream);
    make_done();
  }
  return future_;
}

void CudaWork::synchronize() {
  const c10::Stream current = current_stream(place_.stream.device());
  if (current != place_.stream) current.wait(*place_.end);
  std::vector<at::Tensor> done;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    done.swap(kept_);
  }
  // The stream that the memory goes back to hasn't waited.
  if (current != place_.submitted) record_memory(done);
}

bool CudaWork::wait(std::chrono::milliseconds timeout) {
  at_torch_boundary([this] { birthplace_.check("work"); });
  synchronize();
  if (place_.capturing) return true;
  if (place_.blocking || timeout != kNoTimeout) wait_on_host(timeout);
  check();
  return true;
}

void CudaWork::wait_on_host(std::chrono::milliseconds timeout) {
  // With the call's own timeout the kernel gives up by itself, and says whom it waited for; it only started later.
  const int64_t limit_ms =
      clamp_timeout_ms(timeout == kNoTimeout ? clamp_timeout_ms(place_.timeout_ms) + kKernelGraceMs : timeout.count());
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::milliseconds(limit_ms);
  for (int polls = 0; !place_.end->query(); ++polls) {
    if (std::chrono::steady_clock::now() > deadline) {
      check();
      throw_late(name_, rank_, std::chrono::milliseconds(limit_ms));
    }
    if (polls > 1000) std::this_thread::sleep_for(std::chrono::microseconds(100));
  }
}

}  // namespace mnnvl
