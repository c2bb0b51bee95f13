// The one owner of waiting: it knows the deadline, the abort words and what to record. A wait that gives up returns
// false; its thread then publishes nothing more and leaves the kernel. Nothing traps: the context stays usable.
#pragma once

#include <cstdint>

#include "kernels/memory_order.cuh"
#include "protocol/workspace.h"

namespace mnnvl::kernels {

__device__ __forceinline__ DeviceControl* control_of(const DeviceGroup& g, int rank) {
  return reinterpret_cast<DeviceControl*>(g.peers[rank] + g.layout.control_offset);
}

class Wait {
 public:
  // Every group of polls, for the cheap words on this device; every 2^14, for the host's words behind PCIe.
  static constexpr uint32_t kCheckEvery = 64, kCheckHostEvery = 1u << 14;

  __device__ __forceinline__ Wait(const DeviceGroup& g, Operation operation, uint32_t stage, uint64_t sequence)
      : g_(g), sequence_(sequence), operation_(operation), stage_(stage) {}

  // Call after each fruitless poll for `peer`. False: give up.
  __device__ __forceinline__ bool keep_on(int peer, uint64_t expected, uint64_t seen) {
    if (++polls_ % kCheckEvery != 0) return true;
    return check(peer, expected, seen);
  }

 private:
  __device__ __noinline__ bool check(int peer, uint64_t expected, uint64_t seen) {
    const uint64_t now = globaltimer_ns();
    if (start_ns_ == 0) start_ns_ = now;
    const uint32_t abort = ld_relaxed_sys_u32(&control_of(g_, g_.rank)->abort);
    if (abort != 0) return give_up(FailureCause::kPeerFailed, abort_rank(abort), expected, seen);
    if (now - start_ns_ > g_.timeout_ns) return give_up(FailureCause::kDeadline, peer, expected, seen);
    if (polls_ % kCheckHostEvery != 0) return true;
    if (ld_relaxed_sys_u32(&g_.mailbox->abort) != 0) return give_up(FailureCause::kLocalAbort, g_.rank, expected, seen);
    const bool dead = ld_relaxed_sys_u32(&g_.mailbox->dead_ranks[peer / 32]) >> (peer % 32) & 1u;
    // What a dead rank stored before it died still counts: give up only at the next check, after more polls.
    if (dead && peer_seen_dead_) return give_up(FailureCause::kPeerDied, peer, expected, seen);
    peer_seen_dead_ = dead;
    return true;
  }

  __device__ bool give_up(FailureCause cause, int peer, uint64_t expected, uint64_t seen) {
    DeviceControl* own = control_of(g_, g_.rank);
    if (atomicCAS(&own->failed, 0u, 1u) != 0u) return false;
    FailureRecord* record = &g_.mailbox->record;
    record->cause = cause;
    record->rank = g_.rank;
    record->peer = peer;
    record->operation = operation_;
    record->stage = stage_;
    record->sequence = sequence_;
    record->expected = expected;
    record->seen = seen;
    __threadfence_system();
    st_relaxed_sys_u32(&record->valid, 1u);
    // Peers hear of the rank where it began: the one that is dead or late, or, after abort(), this one.
    const uint32_t word = abort_word(cause == FailureCause::kLocalAbort ? g_.rank : peer);
    for (int r = 0; r < g_.world_size; ++r) st_relaxed_sys_u32(&control_of(g_, r)->abort, word);
    return false;
  }

  const DeviceGroup& g_;
  uint64_t start_ns_ = 0;
  uint64_t sequence_;
  Operation operation_;
  uint32_t stage_;
  uint32_t polls_ = 0;
  bool peer_seen_dead_ = false;
};

}  // namespace mnnvl::kernels
