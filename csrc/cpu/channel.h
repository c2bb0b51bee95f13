// The channels of messages between pairs of ranks, and why they are safe.
//
// A rank's segment (layout.h) ends in one ring for each peer: the channel from that source to this rank, the
// destination. segment.h says how large they are.
//
//   ring of distance 1, 2, ... world_size - 1:   [posted][taken][slot 0] ... [slot R - 1]       R = kRingSlots
//   the source is rank destination + distance, modulo the world's size
//
//   word              writer            reader       protocol                                              at rest
//   posted            source            destination  how many slots the source has filled so far           last
//   taken             destination       source       how many slots the destination has emptied: credit    last
//   bell.rings        anyone, fetch_add its rank     grows whenever somebody rings; a futex                anything
//   bell.sleepers     its rank          anyone       how many threads of the rank are in, or about to      0
//                                                    enter, futex_wait on rings
//
// Both counters are 32 bits, only grow, are compared by difference and go on from what a messenger finds in its own
// words. No third rank takes part, and steps don't count here: channels are independent of the collectives.
//
// Slots: why nobody reads bytes that are being overwritten. The source writes slot n % R, for the n-th time around,
// only while n - taken < R, so after the destination has stored taken > n - R, which follows its last read of what was
// there; the destination reads it only while posted > n, stored after the last write. All stores of the words are
// seq_cst and so are the loads, so the slots' bytes are ordered by them.
//
// Messages. A message is a header (MessageHeader) and its bytes, cut into slots: the first holds the header and the
// first bytes, the others bytes alone, each as many as it can; one without bytes takes a slot too. Both ends compute
// the cut from the header, and the next message begins with the next slot. So a small message is one slot, posted by
// one store. Messages of a channel are in the order in which they were sent.
//
// Waking: why no wake-up is lost. One word for each rank, whoever it waits for. Who has posted into a rank's ring, or
// given credit to it, then loads sleepers of that rank's bell, and only if it is not 0 adds to rings and makes the wake
// call. Who sleeps adds to its own sleepers, loads rings, looks at every channel that it could move, and then sleeps
// while rings is what it was. All of these are seq_cst. If the writer's load of sleepers gives 0, its store precedes
// the sleeper's addition in the total order, and with it every load of that look: the sleeper sees the store and
// doesn't sleep. Otherwise the writer adds to rings after the sleeper's addition. If that precedes the sleeper's load
// of rings, so does the store precede the look, and is seen; else the kernel's compare finds a changed word, or the
// sleeper is queued by then and woken. A channel that the sleeper leaves out of its look, because it had nothing to
// move there, is looked at by the thread that gives it something to move. Each sleep is bounded by kMaxSleepMs all the
// same, for deadlines and dead peers.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "cpu/backoff.h"
#include "cpu/layout.h"

namespace mnnvl::cpu {

// 1 MiB in pieces that are soon passed on: a smaller ring halves the speed of large messages (docs/notes.md).
constexpr int kRingSlots = 32;
static_assert((kRingSlots & (kRingSlots - 1)) == 0, "n % R must not jump where the counters wrap");
constexpr int64_t kMinRingSlotBytes = 2 * kCacheLine;
constexpr int64_t kMaxRingSlotBytes = 32 << 10;

struct ChannelWords {
  alignas(kCacheLine) std::atomic<uint32_t> posted;
  alignas(kCacheLine) std::atomic<uint32_t> taken;
};

// What both ends must have in common (CallDescriptor), and which message of the channel it is.
struct MessageHeader {
  int64_t bytes;
  int32_t tag;
  int32_t dtype;
  uint32_t sequence;
  uint32_t unused[3];
};
static_assert(sizeof(MessageHeader) == 32, "with it a message of 32 bytes fits one cache line");
static_assert(sizeof(MessageHeader) < kMinRingSlotBytes);

constexpr int64_t ring_bytes(int64_t slot_bytes) {
  return static_cast<int64_t>(sizeof(ChannelWords)) + kRingSlots * slot_bytes;
}

// One channel, as both ends see it.
struct Channel {
  ChannelWords* words = nullptr;
  int64_t slot_bytes = 0;

  std::byte* slot(uint32_t n) const {
    return reinterpret_cast<std::byte*>(words + 1) + static_cast<int64_t>(n % kRingSlots) * slot_bytes;
  }
};

// `rings`: where the destination's rings begin.
inline Channel channel_at(std::byte* rings, int64_t slot_bytes, int source, int destination, int world_size) {
  const int distance = (source - destination + world_size) % world_size;
  return {reinterpret_cast<ChannelWords*>(rings + (distance - 1) * ring_bytes(slot_bytes)), slot_bytes};
}

// Behind every store to a word that the bell's rank may sleep for.
inline void ring(Bell& bell) {
  if (bell.sleepers.load(std::memory_order_seq_cst) == 0) return;
  bell.rings.fetch_add(1, std::memory_order_seq_cst);
  futex_wake_all(bell.rings);
}

}  // namespace mnnvl::cpu
