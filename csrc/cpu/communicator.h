// The collectives over host memory: the CPU transport, and the bit-for-bit reference of the kernels.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "protocol/failure.h"
#include "protocol/types.h"

namespace mnnvl::cpu {

struct CommunicatorOptions {
  int rank = 0;
  int world_size = 1;
  // [world_size], each `segment_bytes` long, zero-filled before first use on any rank, aligned to 64 bytes.
  std::vector<std::byte*> segments;
  size_t segment_bytes = 0;    // the same on all ranks
  std::vector<int> peer_pids;  // [world_size]; -1: not watched (own process, or not visible)
};

// Collective calls: all ranks, same order, one thread at a time per communicator. Every call ends within `timeout_ms`.
// On failure it throws Error (kTimeout, kPeerFailed or kAborted) with a full text, tells peers through their abort
// words, and every later call throws the same error at once. abort() may be called from any thread at any time.
class Communicator {
 public:
  static std::unique_ptr<Communicator> create(const CommunicatorOptions& options);
  virtual ~Communicator() = default;

  // out may equal in; otherwise they must not overlap. Any alignment, any numel >= 0.
  virtual void all_reduce(const void* in, void* out, int64_t numel, Dtype dtype, ReduceOp op, Strategy strategy,
                          int64_t timeout_ms) = 0;
  // Each rank contributes `bytes` at `in`; rank r's land at outs[r] on every rank. outs[rank] may equal in.
  virtual void all_gather(const void* in, void* const* outs, int64_t bytes, int64_t timeout_ms) = 0;
  virtual void broadcast(void* data, int64_t bytes, int root, int64_t timeout_ms) = 0;
  virtual void barrier(int64_t timeout_ms) = 0;
  virtual void abort() = 0;
  // Throws the failure of this group, if it has one by now. Any thread.
  virtual void check() const = 0;
};

// Smallest and default segment sizes for a world size.
size_t default_segment_bytes(int world_size);

}  // namespace mnnvl::cpu
