// What a process group or a standalone workspace calls: collectives over raw pointers, on the CPU or on a GPU stream.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "bootstrap/exchange.h"
#include "memory/symmetric_buffer.h"
#include "protocol/types.h"

namespace mnnvl {

struct TransportOptions {
  int64_t timeout_ms = 0;
  int64_t workspace_bytes = 0;  // all of a rank's workspace; 0: the default
  int64_t stage_bytes = 0;  // nonzero: a Lamport-only workspace whose generations hold this (the standalone function)
  Strategy strategy = Strategy::kAuto;  // for calls that ask for kAuto
  bool multicast = true;  // allowed; used where every rank can
  Bootstrap bootstrap = Bootstrap::kAuto;
  std::string host_id;
  std::string nccl_path;
};

// All calls are collective and made in the same order on every rank, from one thread at a time. Failures are Errors;
// after one, every later call throws the same. World size is at least 2: a group of one never makes a transport.
class Transport {
 public:
  virtual ~Transport() = default;

  // `stream` is a native stream handle, null on the CPU, where calls return with the result in place; on a GPU they
  // enqueue. `out` may equal `in`.
  virtual void all_reduce(const void* in, void* out, int64_t numel, Dtype dtype, ReduceOp op, Strategy strategy,
                          bool pdl, void* stream) = 0;
  virtual void all_gather(const void* in, void* const* outs, int64_t bytes, void* stream) = 0;
  virtual void broadcast(void* data, int64_t bytes, int root, void* stream) = 0;
  virtual void barrier(void* stream) = 0;

  // Throws the failure of this group, if it has one by now.
  virtual void check() = 0;
  // From any thread: ends all waits here, and tells the peers.
  virtual void abort() = 0;
  virtual void set_timeout(int64_t timeout_ms) = 0;
  // Waits for what was enqueued and releases the memory; nothing but check() may be called afterwards. Idempotent; the
  // destructor does it too.
  virtual void close() = 0;
};

// Collective: what must be the same on every rank and isn't looked at elsewhere. Error(kInvalidArgument) naming two ranks.
void agree_on_options(Exchange& exchange, const TransportOptions& options);

std::unique_ptr<Transport> make_cpu_transport(Exchange& exchange, const TransportOptions& options);
// `device` is a CUDA ordinal.
std::unique_ptr<Transport> make_cuda_transport(Exchange& exchange, int device, const TransportOptions& options);

}  // namespace mnnvl
