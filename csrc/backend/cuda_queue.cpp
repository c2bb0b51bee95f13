#include "backend/cuda_queue.h"

#include <c10/core/DeviceGuard.h>
#include <c10/core/StreamGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <thread>

#include "backend/errors.h"
#include "kernels/kernels.h"

namespace mnnvl {

CudaQueue::CudaQueue(std::shared_ptr<Transport> transport, at::Device device)
    : device_(device), transport_(std::move(transport)), events_(device.type()) {}

CudaQueue::~CudaQueue() {
  if (captured_ && !closed_) (void)new std::shared_ptr<Transport>(transport_);  // never released
  give_back_streams();
}

// Those on which something may still run, or be captured, are left alone for good.
void CudaQueue::give_back_streams() noexcept {
  try {
    if (captured_ || !idle()) return;
    for (const auto& entry : tracks_) {
      kernels::table().host.give_back_stream(device_.index(), entry.second.stream.native_handle());
    }
    tracks_.clear();
  } catch (const std::exception& error) {  // the context is lost
    TORCH_WARN("mnnvl: cannot tell whether a stream is idle: ", error.what());
  }
}

void CudaQueue::check_open() const {
  TORCH_CHECK_WITH(DistBackendError, !closed_, "mnnvl: this group has been shut down");
}

void CudaQueue::enqueue(bool async, Work work, Then then) {
  std::lock_guard<std::mutex> lock(mutex_);
  check_open();
  at_torch_boundary([this] { check_attached(*transport_); });
  const c10::impl::VirtualGuardImpl guard(device_.type());
  const c10::Stream current = guard.getStream(device_);
  if (async && !async_stream_) async_stream_ = guard.getStreamFromGlobalPool(device_, /*isHighPriority=*/true);
  StreamOrder* const order = &order_;
  enqueue_on(async ? *async_stream_ : current, current, order, work, then);
}

void CudaQueue::enqueue_messages(const ExchangeRequest& request, Work work, Then then) {
  std::lock_guard<std::mutex> lock(mutex_);
  check_open();
  at_torch_boundary([this] { check_attached(*transport_); });
  const c10::Stream current = c10::impl::VirtualGuardImpl(device_.type()).getStream(device_);
  std::vector<Track*> tracks;
  const auto add = [&](const Message* messages, int count, bool incoming) {
    for (int i = 0; i < count; ++i) {
      Track* one = &track(messages[i].peer, incoming);
      if (std::find(tracks.begin(), tracks.end(), one) == tracks.end()) tracks.push_back(one);
    }
  };
  add(request.sends, request.send_count, /*incoming=*/false);
  add(request.receives, request.receive_count, /*incoming=*/true);
  std::vector<StreamOrder*> orders;
  for (Track* one : tracks) orders.push_back(&one->order);
  enqueue_on(tracks.front()->stream, current, orders, work, then);
}

// Streams of torch's pool won't do: it deals out 32 to everybody, and what waits in one of them would hold up its other
// users.
CudaQueue::Track& CudaQueue::track(int peer, bool incoming) {
  const auto known = tracks_.find({peer, incoming});
  if (known != tracks_.end()) return known->second;
  void* stream = at_torch_boundary([&] { return kernels::table().host.take_stream(device_.index()); });
  // How torch numbers streams that it didn't make.
  const c10::Stream made(c10::Stream::UNSAFE, device_, reinterpret_cast<c10::StreamId>(stream));
  return tracks_.emplace(std::make_pair(peer, incoming), Track{made, StreamOrder()}).first->second;
}

void CudaQueue::enqueue_on(c10::Stream stream, c10::Stream current, c10::ArrayRef<StreamOrder*> orders, Work work,
                           Then then) {
  const c10::DeviceGuard device_guard(device_);
  std::optional<c10::StreamGuard> stream_guard;  // if need be: it costs more
  if (stream != current) {
    const auto ready = events_.take();
    ready->record(current);
    stream.wait(*ready);
    stream_guard.emplace(stream);
  }
  bool capturing = false;
  for (StreamOrder* order : orders) capturing = order->enter(stream);
  captured_ = captured_ || capturing;
  // What was launched before a failure is in flight like any other: later calls come behind it, and `then` holds its
  // memory.
  std::exception_ptr failure;
  try {
    work(stream.native_handle());
  } catch (...) {
    failure = std::current_exception();
  }
  // An event of a capture stays with it.
  auto end = capturing ? std::make_shared<c10::Event>(device_.type()) : events_.take();
  end->record(stream);
  for (StreamOrder* order : orders) order->leave(stream, end);
  then({stream, current, std::move(end), capturing});
  if (failure) std::rethrow_exception(failure);
}

bool CudaQueue::idle() const {
  return order_.idle() &&
         std::all_of(tracks_.begin(), tracks_.end(), [](const auto& entry) { return entry.second.order.idle(); });
}

bool CudaQueue::wait_idle(std::chrono::milliseconds timeout) {
  const auto deadline = std::chrono::steady_clock::now() + timeout;
  for (;;) {
    {
      // Whoever launches may be held up by a full queue of the device.
      const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
      if (lock && (closed_ || idle())) return true;
    }
    if (std::chrono::steady_clock::now() >= deadline) return false;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
}

size_t CudaQueue::detach(Exchange& exchange) {
  std::lock_guard<std::mutex> lock(mutex_);
  check_open();
  const c10::DeviceGuard guard(device_);
  return transport_->detach(exchange);
}

void CudaQueue::attach(Exchange& exchange) {
  std::lock_guard<std::mutex> lock(mutex_);
  check_open();
  const c10::DeviceGuard guard(device_);
  transport_->attach(exchange);
}

void CudaQueue::close() {
  std::lock_guard<std::mutex> lock(mutex_);
  closed_ = true;
  transport_->close();
  give_back_streams();
}

}  // namespace mnnvl
