// Where everything stands in a rank's peer-mapped device workspace, and the plain handle that kernels get by value.
// Every shared word with its writer, reader and protocol: the table in csrc/README.md.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/math.h"
#include "protocol/failure.h"
#include "protocol/types.h"

namespace mnnvl {

constexpr uint32_t kLamportSentinel = 0x80000000u;  // "nothing here yet": -0.0f, or {+0, -0} in 16-bit pairs
constexpr int kGenerations = 3;  // two would do for launches in a row; csrc/README.md says why a third stays
constexpr int kStageAlign = 128;

constexpr int kPipeBlocks = 96;  // most blocks of an epoch kernel
constexpr int kPipeDepth = 4;    // slots per block; csrc/README.md derives the number

// One cache line that peers may write to, and this rank's state that kernels advance. Zero at rest.
struct alignas(128) DeviceControl {
  // Read with one 16-byte load at the start of every Lamport kernel.
  uint32_t generation;  // of the next Lamport call, 0..2
  uint32_t abort;       // abort_word() of the first failure heard of; written by peers and by this rank
  uint32_t calls;       // Lamport calls so far
  uint32_t arrivals;    // blocks of the running call that have read this line; wraps to 0
  uint32_t failed;      // claimed by the first thread that gives up a wait: it alone writes the record
  uint32_t padding[27];
  uint32_t pipe_epoch[kPipeBlocks];  // last epoch of each block of the epoch kernels
};
static_assert(offsetof(DeviceControl, generation) == 0 && offsetof(DeviceControl, arrivals) == 12, "one 16-byte load");
static_assert(offsetof(DeviceControl, pipe_epoch) == 128, "apart from the words that peers write");

// Pinned host memory, one per workspace, mapped on the device.
struct HostMailbox {
  FailureRecord record;       // device to host
  uint32_t abort;  // host to device: a FailureCause that ends every wait (abort(), or a failure of the host)
  uint32_t dead_ranks[3];  // host to device: bit r set when rank r's process has ended
};

struct WorkspaceLayout {
  int64_t generation_bytes;  // one Lamport generation; stage 1 of a two-shot starts at its half
  int64_t pipe_slot_bytes;  // one slot of one block; 0: no epoch kernels in this workspace
  int64_t pipe_offset;
  int64_t signal_offset;
  int64_t control_offset;
  int64_t total_bytes;

  // `stage_bytes`: capacity of one two-shot stage (a one-shot may use both). `pipe_bytes`: room for the epoch slots.
  static constexpr WorkspaceLayout make(int64_t stage_bytes, int64_t pipe_bytes, int world_size) {
    WorkspaceLayout l{};
    // Slices are whole packs, so every source may take one pack more than its share of the bytes.
    l.generation_bytes = 2 * align_up(stage_bytes + int64_t{world_size} * kPackBytes, kStageAlign);
    l.pipe_offset = kGenerations * l.generation_bytes;
    // Every source has at least one pack, however small the workspace and large the world.
    l.pipe_slot_bytes = pipe_bytes == 0 ? 0
                                        : max64(align_down(pipe_bytes / (kPipeBlocks * kPipeDepth), kStageAlign),
                                                align_up(int64_t{world_size} * kPackBytes, kStageAlign));
    l.signal_offset = l.pipe_offset + l.pipe_slot_bytes * kPipeBlocks * kPipeDepth;
    l.control_offset = l.signal_offset + align_up(int64_t{kPipeBlocks} * kMaxWorldSize * 4, kStageAlign);
    l.total_bytes = l.control_offset + align_up(sizeof(DeviceControl), kStageAlign);
    return l;
  }

  // A process group's: three quarters for the Lamport generations (the longer an all-reduce kernel, the less its ends
  // cost), the rest for the epoch slots.
  static constexpr WorkspaceLayout for_group(int64_t bytes, int world_size) {
    const int64_t stage = bytes / 8;
    return make(stage, bytes - 2 * kGenerations * stage, world_size);
  }

  // Most elements one launch can carry.
  MNNVL_HOST_DEVICE constexpr int64_t oneshot_capacity(int world_size, int element_bytes) const {
    return align_down(generation_bytes / world_size, kPackBytes) / element_bytes;
  }
  MNNVL_HOST_DEVICE constexpr int64_t twoshot_capacity(int world_size, int element_bytes) const {
    return align_down(generation_bytes / 2 / kPackBytes, world_size) * kPackBytes / element_bytes;
  }
  // Bytes that one source may put into one slot.
  MNNVL_HOST_DEVICE constexpr int64_t pipe_piece_bytes(int world_size) const {
    return align_down(pipe_slot_bytes / world_size, kPackBytes);
  }
};

// Everything a kernel must know of its group; built once on the host, passed by value.
struct DeviceGroup {
  std::byte* peers[kMaxWorldSize];  // every rank's workspace as mapped here; [rank] is the own one
  std::byte* multicast;  // the same offsets, stores reach all ranks; null without multicast
  HostMailbox* mailbox;
  WorkspaceLayout layout;
  uint64_t timeout_ns;
  int rank;
  int world_size;
};

// Two-shot: pack j of owner o's slice is pack o * slice + j of the tensor.
MNNVL_HOST_DEVICE constexpr int64_t slice_packs(int64_t packs, int world_size) { return ceil_div(packs, world_size); }

}  // namespace mnnvl
