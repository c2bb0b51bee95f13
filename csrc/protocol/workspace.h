// Where everything stands in a rank's peer-mapped device workspace, and the plain handle that kernels get by value.
// Every shared word with its writer, reader and protocol: the table in csrc/README.md.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/math.h"
#include "protocol/channels.h"
#include "protocol/failure.h"
#include "protocol/types.h"

namespace mnnvl {

constexpr uint32_t kLamportSentinel = 0x80000000u;  // "nothing here yet": -0.0f, or {+0, -0} in 16-bit pairs
constexpr int kGenerations = 3;  // two would do for launches in a row; windows need more slots before they come round
// A large two-shot goes in windows, so many to a generation. A block stores nothing of window w before it has finished
// window w - kWindowLag; csrc/README.md, "Windows", has the conditions below.
constexpr int kGenerationWindows = 4;
constexpr int kWindowLag = 3;
static_assert(kWindowLag >= 2 && kWindowLag < kGenerationWindows &&
              2 * kWindowLag <= kGenerations * kGenerationWindows);
constexpr int kStageAlign = 128;

// One cache line that peers may write to, and this rank's state that kernels advance. Zero at rest.
struct alignas(128) DeviceControl {
  // Read with one 16-byte load at the start of every Lamport kernel.
  uint32_t generation;  // of the next Lamport call, 0..2
  uint32_t abort;  // abort_word() of the first failure heard of; written by peers and by this rank
  uint32_t calls;  // Lamport calls so far
  uint32_t arrivals;  // blocks of the running call that have read this line; wraps to 0
  uint32_t failed;  // claimed by the first thread that gives up a wait: it alone writes the record
};
static_assert(offsetof(DeviceControl, generation) == 0 && offsetof(DeviceControl, arrivals) == 12, "one 16-byte load");

// What one direction of one lane of a channel has seen, in its rank's own memory. Zero at rest.
struct LaneState {
  uint64_t messages;
  uint32_t slots;
  uint32_t busy;  // 1 while a kernel is at it
};

// Pinned host memory, one per workspace, mapped on the device.
struct HostMailbox {
  FailureRecord record;  // device to host
  uint32_t abort;  // host to device: a FailureCause that ends every wait (abort(), or a failure of the host)
  uint32_t dead_ranks[3];  // host to device: bit r set when rank r's process has ended
};

struct WorkspaceLayout {
  int64_t generation_bytes;  // one Lamport generation; stage 1 of a two-shot starts at its half
  ChannelLayout channel;  // of every channel
  int64_t slots_offset;
  int64_t lines_offset;  // from here to the end: zero at rest
  int64_t headers_offset;
  int64_t posted_offset;
  int64_t credit_offset;
  int64_t state_offset;
  int64_t control_offset;
  int64_t total_bytes;

  // `stage_bytes`: capacity of one two-shot stage (a one-shot may use both). `channel_bytes`: room for all channels'
  // lines and slots; 0: none.
  static constexpr WorkspaceLayout make(int64_t stage_bytes, int64_t channel_bytes, int world_size) {
    WorkspaceLayout l{};
    // Slices are whole packs, so every source may take one pack more than its share of the bytes.
    l.generation_bytes = 2 * align_up(stage_bytes + int64_t{world_size} * kPackBytes, kStageAlign);
    const int64_t channels = channel_bytes == 0 ? 0 : int64_t{kChannelKinds} * (world_size - 1);
    l.channel = ChannelLayout::make(channels == 0 ? 0 : channel_bytes / channels);
    const int64_t rings = channels * l.channel.lanes;
    l.slots_offset = kGenerations * l.generation_bytes;
    l.lines_offset = l.slots_offset + rings * l.channel.slots * l.channel.slot_bytes;
    l.headers_offset = l.lines_offset + rings * kChannelMessages * l.channel.line_bytes * (kLineBytes / kLineData);
    l.posted_offset = l.headers_offset + channels * kChannelMessages * kHeaderLines * kLineBytes;
    l.credit_offset = l.posted_offset + channels * kMaxLanes * int64_t{sizeof(uint32_t)};
    l.state_offset = l.credit_offset + channels * kMaxLanes * int64_t{sizeof(uint64_t)};
    l.control_offset = l.state_offset + 2 * channels * kMaxLanes * int64_t{sizeof(LaneState)};
    l.total_bytes = l.control_offset + align_up(sizeof(DeviceControl), kStageAlign);
    return l;
  }

  // A process group's: three quarters for the Lamport generations (the longer an all-reduce kernel, the less its ends
  // cost), the rest for the channels.
  static constexpr WorkspaceLayout for_group(int64_t bytes, int world_size) {
    const int64_t stage = bytes / 8;
    return make(stage, bytes - 2 * kGenerations * stage, world_size);
  }

  // Most elements one launch can carry.
  MNNVL_HOST_DEVICE constexpr int64_t oneshot_capacity(int world_size, int element_bytes) const {
    return align_down(generation_bytes / world_size, kPackBytes) / element_bytes;
  }
  // Most packs of each slice that a stage of a two-shot has room for. Multicast fills the own slots too; without it a
  // rank has none.
  MNNVL_HOST_DEVICE constexpr int64_t twoshot_slice(int world_size, bool multicast) const {
    return generation_bytes / 2 / kPackBytes / (multicast ? world_size : world_size - 1);
  }

  // Channels. `at` is whose workspace it is, `peer` the other end; a channel's rings lie with its destination.
  MNNVL_HOST_DEVICE constexpr int64_t channel_index(ChannelKind kind, int at, int peer, int world_size) const {
    return int64_t(kind) * (world_size - 1) + peer - (peer > at ? 1 : 0);
  }
  MNNVL_HOST_DEVICE constexpr int64_t slot(int64_t channel, int lane, uint32_t n) const {
    return slots_offset +
           ((channel * this->channel.lanes + lane) * this->channel.slots + n % uint32_t(this->channel.slots)) *
               this->channel.slot_bytes;
  }
  MNNVL_HOST_DEVICE constexpr int64_t lines(int64_t channel, int lane, uint64_t message) const {
    return lines_offset +
           ((channel * this->channel.lanes + lane) * kChannelMessages + int64_t(message % kChannelMessages)) *
               this->channel.line_bytes * (kLineBytes / kLineData);
  }
  MNNVL_HOST_DEVICE constexpr int64_t header(int64_t channel, uint64_t message) const {
    return headers_offset +
           (channel * kChannelMessages + int64_t(message % kChannelMessages)) * kHeaderLines * kLineBytes;
  }
  MNNVL_HOST_DEVICE constexpr int64_t posted(int64_t channel, int lane) const {
    return posted_offset + (channel * kMaxLanes + lane) * int64_t(sizeof(uint32_t));
  }
  // With the source: `channel` is the one to the destination.
  MNNVL_HOST_DEVICE constexpr int64_t credit(int64_t channel, int lane) const {
    return credit_offset + (channel * kMaxLanes + lane) * int64_t(sizeof(uint64_t));
  }
  MNNVL_HOST_DEVICE constexpr int64_t state(bool incoming, int64_t channel, int lane, int world_size) const {
    const int64_t channels = int64_t(kChannelKinds) * (world_size - 1);
    return state_offset + (((incoming ? channels : 0) + channel) * kMaxLanes + lane) * int64_t(sizeof(LaneState));
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
