// The ranks of a standalone function: a transport that isn't a process group's, set up over any exchange.
#pragma once

#include <ATen/ATen.h>

#include <atomic>
#include <memory>
#include <mutex>
#include <optional>

#include "backend/cuda_queue.h"
#include "backend/fused_function.h"
#include "system/birthplace.h"
#include "transport/transport.h"

namespace mnnvl {

class FunctionGroup {
 public:
  // Collective over `exchange`. `device`: CPU, or CUDA with an index. `buffer_bytes`: one Lamport generation as
  // FlashInfer counts it (one-shot: world_size payloads; two-shot: two payloads).
  FunctionGroup(Exchange& exchange, at::Device device, int64_t buffer_bytes, TransportOptions options);

  int64_t buffer_bytes() const { return buffer_bytes_; }
  // Same shape, dtype and device, contiguous; the caller has checked the capacity. On the current stream.
  void all_reduce(const at::Tensor& input, at::Tensor& output, Strategy strategy, bool pdl);
  // The same for a call without anything unusual about it, which this checks, room and all: two plain tensors of one
  // shape, nobody who traces or records. Else false, and nothing has happened. kAuto: one shot where that takes at most
  // `oneshot_bytes` of the buffer.
  bool all_reduce_if_usual(const at::Tensor& input, const at::Tensor& output, Strategy strategy, bool pdl,
                           int64_t oneshot_bytes);
  // Every tensor checked by fused_request(); the caller has checked the capacity. On the current stream.
  void fused_all_reduce(const FusedTensors& tensors, Strategy strategy, bool pdl);
  // Transport's, of a group of one too. For the same rank of as many. After detach() every call throws "not attached".
  int64_t detach(Exchange& exchange);
  void attach(Exchange& exchange);
  bool attached();
  // Unmaps; idempotent. Without it a workspace that was used in a capture stays mapped for the process's life.
  void destroy();
  // In a child by fork(): calls throw, destroy() does nothing, and the destructor may not run.
  bool is_parents() const { return birthplace_.left(); }

 private:
  void all_reduce_checked(const at::Tensor& input, const at::Tensor& output, Strategy strategy, bool pdl);
  void run(const Request& request);
  void run_alone(const FusedRequest& request);
  void check_same_ranks(const Exchange& exchange) const;

  const Birthplace birthplace_;
  const at::Device device_;
  const int64_t buffer_bytes_;
  const int64_t timeout_ms_;
  const int rank_, size_;
  std::atomic<bool> alone_attached_{true};  // of a group of one, which has no transport
  std::mutex mutex_;  // the calls of several threads on the CPU, and destroy()
  bool destroyed_ = false;
  std::unique_ptr<Transport> cpu_;
  std::optional<CudaQueue> cuda_;
};

}  // namespace mnnvl
