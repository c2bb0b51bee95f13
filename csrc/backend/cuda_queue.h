// Collectives on CUDA tensors, in their order: one transport, one order of launches, whichever streams they come on.
// Used by the process group and by the standalone function.
#pragma once

#include <c10/core/Event.h>
#include <c10/core/Stream.h>
#include <c10/util/ArrayRef.h>
#include <c10/util/FunctionRef.h>

#include <chrono>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

#include "backend/event_pool.h"
#include "backend/stream_order.h"
#include "transport/transport.h"

namespace mnnvl {

// Any thread.
class CudaQueue {
 public:
  CudaQueue(std::shared_ptr<Transport> transport, at::Device device);
  // A workspace that a captured graph may read stays mapped, unless close() was called: a replay must not read unmapped
  // memory.
  ~CudaQueue();

  at::Device device() const { return device_; }
  const std::shared_ptr<Transport>& transport() const { return transport_; }

  struct Enqueued {
    c10::Stream stream;
    c10::Stream submitted;            // the caller's current stream
    std::shared_ptr<c10::Event> end;  // recorded on `stream` behind the work
    bool capturing;
  };
  // Calls `work(stream's native handle)`, which enqueues on the caller's current stream or, if `async`, on one of the
  // group's own that waits for it; behind what was enqueued here before. Throws if closed or detached, or if the
  // stream's capture is invalidated, before anything is enqueued. `then` runs under a guard of the stream, behind the
  // work, also if that failed.
  using Work = c10::function_ref<void(void* stream)>;
  using Then = c10::function_ref<void(const Enqueued&)>;
  void enqueue(bool async, Work work, Then then);

  // The same for messages: on streams of the group's own, one for each peer and direction, so that what waits for one
  // peer keeps nothing else waiting. Behind what was enqueued before for any of its peers and directions.
  void enqueue_messages(const ExchangeRequest& request, Work work, Then then);

  // The transport's, between launches: enqueue() waits meanwhile, and throws "not attached" after a detach().
  size_t detach(Exchange& exchange);
  void attach(Exchange& exchange);

  // True once the last work has ended; false after `timeout`.
  bool wait_idle(std::chrono::milliseconds timeout);
  // Waits for what was enqueued and unmaps the workspace. Later enqueue() throws. Idempotent.
  void close();

 private:
  // The messages to, or from, one peer.
  struct Track {
    c10::Stream stream;
    StreamOrder order;
  };
  void check_open() const;
  Track& track(int peer, bool incoming);
  void enqueue_on(c10::Stream stream, c10::Stream current, c10::ArrayRef<StreamOrder*> orders, Work work, Then then);
  bool idle() const;
  void give_back_streams() noexcept;

  const at::Device device_;
  const std::shared_ptr<Transport> transport_;
  std::mutex mutex_;  // the order of launches; against close()
  bool closed_ = false, captured_ = false;
  EventPool events_;
  StreamOrder order_;  // of collectives
  std::optional<c10::Stream> async_stream_;
  std::map<std::pair<int, bool>, Track> tracks_;  // by peer, and whether messages come from it
};

}  // namespace mnnvl
