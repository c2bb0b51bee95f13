// The one owner of waiting: it knows the deadline, the abort words and what to record. A wait that gives up returns
// false; its thread then publishes nothing more and leaves the kernel. Nothing traps: the context stays usable.
#pragma once

#include <cstdint>

#include "kernels/device/memory_order.cuh"
#include "protocol/workspace.h"

namespace mnnvl::kernels {

__device__ __forceinline__ DeviceControl* control_of(const DeviceGroup& g, int rank) {
  return reinterpret_cast<DeviceControl*>(g.peers[rank] + g.layout.control_offset);
}

// Ends this rank's part in the group, once: the first to come writes the record and tells every peer: what it was
// `told` (an abort word), or else what it found itself. `calls`: both ends' descriptions, with kMismatch. Returns
// false.
__device__ inline bool give_up(const DeviceGroup& g, FailureCause cause, int peer, Operation operation, uint32_t stage,
                               uint64_t sequence, uint64_t expected, uint64_t seen,
                               const RecordedCalls* calls = nullptr) {
  if (atomicCAS(&control_of(g, g.rank)->failed, 0u, 1u) != 0u) {
    // The first may still be on its way to the abort word, and a later kernel of this rank must not miss it.
    atomicCAS_system(&control_of(g, g.rank)->abort, 0u, abort_word(peer, cause, g.rank));
    return false;
  }
  FailureRecord* record = &g.mailbox->record;
  record->cause = cause;
  record->rank = g.rank;
  record->peer = peer;
  record->operation = operation;
  record->stage = stage;
  record->sequence = sequence;
  record->expected = expected;
  record->seen = seen;
  if (calls != nullptr) record->calls = *calls;
  // Read again here: kept by every wait, it would cost the kernels' loops a register.
  const uint32_t told = cause == FailureCause::kPeerFailed ? ld_relaxed_sys_u32(&control_of(g, g.rank)->abort) : 0u;
  record->told = told;
  if (told != 0) record->peer = abort_rank(told);  // of the same word: another may have come since the first look
  __threadfence_system();
  st_relaxed_sys_u32(&record->valid, 1u);
  // Peers hear of the rank where it began: the one that is dead or late, or, after abort(), this one.
  const uint32_t word = told != 0 ? told : abort_word(peer, cause, g.rank);
#pragma unroll 1  // taken once: it must not cost the kernels registers
  for (int r = 0; r < g.world_size; ++r) st_relaxed_sys_u32(&control_of(g, r)->abort, word);
  return false;
}

class Wait {
 public:
  // Every group of polls, for the cheap words on this device; every 2^14, for the host's words behind PCIe.
  static constexpr uint32_t kCheckEvery = 64, kCheckHostEvery = 1u << 14;

  __device__ __forceinline__ Wait(const DeviceGroup& g, Operation operation, uint32_t stage, uint64_t sequence)
      : g_(g), sequence_(sequence), operation_(operation), stage_(stage) {}

  // The wait is over, and the next begins, for another `sequence`.
  __device__ __forceinline__ void restart(uint64_t sequence) {
    sequence_ = sequence;
    start_ = 0;
  }

  // Call after each fruitless poll for `peer`, or for all ranks of `absent` (a bit per rank, up to 32) of which `peer`
  // is the first. False: give up. All of it is inlined: a call would need a stack, and for the first kernel with a
  // stack the driver may reserve local memory for every thread the device can hold (docs/notes.md).
  __device__ __forceinline__ bool keep_on(int peer, uint64_t expected, uint64_t seen, uint32_t absent = 0) {
    if (++polls_ % kCheckEvery != 0) return true;
    const uint32_t now = uint32_t(globaltimer_ns() >> kTickShift);
    if (start_ == 0) start_ = now;
    FailureCause cause = FailureCause::kNone;
    if (now - start_ > allowed_ns() >> kTickShift) cause = FailureCause::kDeadline;
    if (polls_ % kCheckHostEvery == 0) {
      const uint32_t among = absent != 0 ? absent : 1u << (peer % 32);
      const uint32_t dead = ld_relaxed_sys_u32(&g_.mailbox->dead_ranks[absent != 0 ? 0 : peer / 32]) & among;
      const int first_dead = dead != 0 ? __ffs(dead) - 1 + (absent != 0 ? 0 : peer / 32 * 32) : -1;
      // What a dead rank stored before it died still counts: give up only at the next check, after more polls.
      const uint32_t dead_now = uint32_t(first_dead + 1) << kDeadShift;
      if (first_dead >= 0 && dead_now == polls_ >> kDeadShift << kDeadShift) {
        cause = FailureCause::kPeerDied;
        peer = first_dead;
      }
      polls_ = dead_now;
      if (const uint32_t here = ld_relaxed_sys_u32(&g_.mailbox->abort); here != 0) {
        cause = FailureCause(here);
        peer = g_.rank;
      }
    }
    if (const uint32_t abort = ld_relaxed_sys_u32(&control_of(g_, g_.rank)->abort); abort != 0) {
      cause = FailureCause::kPeerFailed;
      peer = abort_rank(abort);
    }
    if (cause == FailureCause::kNone) return true;
    return give_up(g_, cause, peer, operation_, stage_, sequence_, expected, seen);
  }

 private:
  // The second stage of a two-shot waits for ranks that may be waiting themselves, and gives them time to say for whom:
  // less than the host's grace (backend/work.cpp).
  __device__ __forceinline__ uint64_t allowed_ns() const {
    constexpr uint64_t kMost = 1'000'000'000;
    const uint64_t eighth = g_.timeout_ns / 8;
    return stage_ == 1 ? g_.timeout_ns + (eighth < kMost ? eighth : kMost) : g_.timeout_ns;
  }

  const DeviceGroup& g_;
  // Few and narrow, as they are kept through every wait.
  static constexpr int kTickShift = 20;  // a tick is 1.05 ms, and 32 bits of them 52 days
  static constexpr int kDeadShift = 16;
  static_assert(kCheckHostEvery < 1u << kDeadShift && kMaxWorldSize < 1 << (32 - kDeadShift));
  uint64_t sequence_;
  Operation operation_;
  uint32_t stage_;
  uint32_t start_ = 0;  // ticks; 0: not looked yet
  uint32_t polls_ =
      0;  // since the last look at the host's words, and above, plus one, the absent rank that was dead then
};

}  // namespace mnnvl::kernels
