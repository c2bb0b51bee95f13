// The standalone function's workspace: a transport that isn't a process group's, set up over any exchange.
#pragma once

#include <ATen/ATen.h>

#include <memory>
#include <mutex>

#include "backend/stream_order.h"
#include "transport/transport.h"

namespace mnnvl {

class Workspace {
 public:
  // Collective over `exchange`. `device`: CPU, or CUDA with an index. `buffer_bytes`: one Lamport generation as
  // FlashInfer counts it (one-shot: world_size payloads; two-shot: two payloads).
  Workspace(Exchange& exchange, at::Device device, int64_t buffer_bytes, TransportOptions options);

  int64_t buffer_bytes() const { return buffer_bytes_; }
  // Same shape, dtype and device, contiguous; the caller has checked the capacity. On the current stream.
  void all_reduce(const at::Tensor& input, at::Tensor& output, Strategy strategy, bool pdl);
  void destroy();  // idempotent

 private:
  at::Device device_;
  int64_t buffer_bytes_;
  int size_;
  std::mutex mutex_;  // the calls of several threads, and destroy()
  bool destroyed_ = false;
  StreamOrder stream_order_;
  std::unique_ptr<Transport> transport_;
};

}  // namespace mnnvl
