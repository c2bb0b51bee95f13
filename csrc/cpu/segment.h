// How a segment is divided: a pure function of its size and the world's, so that all ranks divide alike.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "common/math.h"
#include "cpu/channel.h"
#include "cpu/layout.h"
#include "cpu/plan.h"
#include "protocol/counters.h"

namespace mnnvl::cpu {

struct CommunicatorOptions {
  int rank = 0;
  int world_size = 1;
  // [world_size], each `segment_bytes` long, zero-filled before first use on any rank, aligned to 64 bytes.
  std::vector<std::byte*> segments;
  size_t segment_bytes = 0;  // the same on all ranks
  std::vector<int> peer_pids;  // [world_size]; -1: not watched (own process, or not visible)
  int max_sleep_ms = kMaxSleepMs;  // of messages; tests make it so long that a lost wake-up can't hide
  TransportCounters::Count* slept = nullptr;  // counts the collectives that slept; null: nobody looks
};

inline void copy_bytes(void* to, const void* from, int64_t bytes) {
  if (bytes > 0) std::memcpy(to, from, static_cast<size_t>(bytes));
}

struct Division {
  int64_t step_slot_bytes = 0;  // whole cache lines, as is the next; either below its least: the segment is too small
  int64_t ring_slot_bytes = 0;

  int64_t rings_offset() const { return static_cast<int64_t>(kControlBytes) + kSlots * step_slot_bytes; }
};

constexpr size_t segment_bytes_of(int64_t step_slot_bytes, int64_t ring_slot_bytes, int world_size) {
  return kControlBytes + static_cast<size_t>(kSlots * step_slot_bytes + (world_size - 1) * ring_bytes(ring_slot_bytes));
}

// The steps come first: what the rings get is the segment beyond the largest slots that steps use, or a quarter, or the
// least that rings can do with. Only what is used becomes memory.
constexpr Division divide(size_t segment_bytes, int world_size) {
  const int64_t all = static_cast<int64_t>(segment_bytes) - static_cast<int64_t>(kControlBytes);
  const int rings = world_size - 1;
  Division division;
  int64_t left = all;
  if (rings > 0) {
    const int64_t share = max64(max64(all - kSlots * kMaxChunkBytes, all / 4), rings * ring_bytes(kMinRingSlotBytes));
    const int64_t slot = (min64(share, all) / rings - ring_bytes(0)) / kRingSlots;
    division.ring_slot_bytes = min64(align_down(slot, kCacheLine), kMaxRingSlotBytes);
    left = all - rings * ring_bytes(division.ring_slot_bytes);
  }
  division.step_slot_bytes = align_down(left / kSlots, kCacheLine);
  return division;
}

}  // namespace mnnvl::cpu
