// A launch of messages as the device sees it, and one lane's way through it.
#pragma once

#include "kernels/device/channel.cuh"
#include "kernels/kernels.h"

namespace mnnvl::kernels {

struct DeviceMessage {
  std::byte* data;
  Cut cut;
  uint64_t call;  // pack()ed
  int32_t tag;
};

// The messages of one channel, in their order.
struct DeviceChannel {
  int16_t peer;
  int16_t first;
  int16_t count;
};

struct Role {
  RoleShape shape;
  Operation operation;
  int first_channel;
  int channels;
};

template <int kMessages, int kChannels>
struct DeviceParams {
  DeviceGroup group;
  ChannelKind kind;
  Role sends, receives;
  LocalCopy copy;
  DeviceChannel channels[kChannels];
  DeviceMessage messages[kMessages];
};

// Appends the messages of one role, those of each peer together, the next rank's first.
template <typename Params>
void add_role(Params& p, Role& role, const ChannelMessage* messages, int count, int& channels, int& filled) {
  role.first_channel = channels;
  const int world = p.group.world_size;
  for (int distance = 1; distance < world; ++distance) {
    const int peer = (p.group.rank + distance) % world;
    DeviceChannel channel{int16_t(peer), int16_t(filled), 0};
    for (int i = 0; i < count; ++i) {
      if (messages[i].peer != peer) continue;
      const Cut cut = Cut::make(p.group.layout.channel, messages[i].bytes);
      p.messages[filled++] = {static_cast<std::byte*>(messages[i].data), cut, messages[i].call, messages[i].tag};
      ++channel.count;
    }
    if (channel.count > 0) p.channels[channels++] = channel;
  }
  role.channels = channels - role.first_channel;
}

enum class Mode : int { kSendLines, kTakeLines, kCopy, kStop };

struct Piece {
  Mode mode;
  int peer;
  const std::byte* from;
  std::byte* to;
  int bytes;
  uint64_t flag;
  // What the signal warp then says to the peer, and which of its threads; -1: none.
  uint64_t notice;
  int notifier;
};

// One thread of a signal warp: one end of one lane of a channel, and where in its messages it is.
template <bool kSends, typename Params>
struct Lane {
  const Params& p;
  const LaneWords words;
  const int peer;
  int message, end;  // the current one, and behind the last, in p.messages
  int32_t i = 0, pieces = 0;  // of the current message in this lane
  bool begun = false;  // of the current message: a source has room for it, a destination has seen its header
  uint64_t messages = 0;
  uint32_t slots = 0;
  uint64_t credit = 0;  // sources: last seen; destinations, at first: what earlier kernels took
  uint32_t posted = 0;  // destinations: last seen

  __device__ __forceinline__ Lane(const Params& params, const DeviceChannel& channel, int lane, bool serves)
      : p(params),
        words(params.group, params.kind, channel.peer, lane, !kSends),
        peer(channel.peer),
        message(channel.first),
        end(serves ? channel.first + channel.count : channel.first) {}

  // Where the lane's last kernel left off. False if that one isn't over.
  __device__ __forceinline__ bool load_state(Operation operation) {
    LaneState* own = LaneWords::state(p.group, p.kind, peer, words.lane, !kSends);
    const LaneState state = *own;
    if (kSends) credit = ld_acquire_sys_u64(words.credit);  // in flight beside the load above
    messages = state.messages;
    slots = state.slots;
    posted = slots;  // none seen
    if (!kSends) credit = taken();
    if (state.busy != 0) {
      return give_up(p.group, FailureCause::kConcurrent, peer, operation, kStageMessage, messages, 0, 0);
    }
    own->busy = 1;
    open();
    return true;
  }
  __device__ __forceinline__ void store_state() const {
    *LaneWords::state(p.group, p.kind, peer, words.lane, !kSends) = {messages, slots, /*busy=*/0};
  }
  __device__ __forceinline__ uint64_t taken() const { return uint64_t(slots) << 32 | uint32_t(messages); }

  // The next message that has a piece for this lane.
  __device__ __forceinline__ void open() {
    for (; message < end; ++message) {
      pieces = cut().pieces_of(words.lane);
      i = 0;
      begun = false;
      if (pieces > 0) return;
    }
  }
  __device__ __forceinline__ bool active() const { return message < end; }
  // Read where it stands, the kernel's parameters: registers are few.
  __device__ __forceinline__ const Cut& cut() const { return p.messages[message].cut; }

  // Whether a piece can move now. `alone`: no other lane of this block has anything left, so that lines may be waited
  // for by the data warps.
  __device__ __forceinline__ bool ready(bool alone) {
    const auto look = [&] { return kSends ? has_room() : has_data(alone); };
    if (look()) return true;
    if (kSends) {
      credit = ld_acquire_sys_u64(words.credit);
    } else {
      posted = ld_acquire_sys_u32(words.posted);
    }
    return look();
  }
  __device__ __forceinline__ bool has_room() {
    begun = begun || uint32_t(messages) - uint32_t(credit) < kChannelMessages;
    return begun && (cut().lines || slots - uint32_t(credit >> 32) < uint32_t(p.group.layout.channel.slots));
  }
  __device__ __forceinline__ bool has_data(bool alone) const {
    if (cut().lines) return alone || (words.lane == 0 ? begun : line_is_there(words.lines(p.group, messages), flag()));
    return (words.lane != 0 || begun) && posted != slots;
  }
  __device__ __forceinline__ uint64_t flag() const { return flag_of(messages); }

  // Looks for the header of message `number` of the lane, p.messages[of]; false after a mismatch.
  __device__ __forceinline__ bool check_header(Operation operation, uint64_t number, int of, bool& seen) const {
    uint64_t call;
    int32_t tag;
    seen = load_header(words.header(p.group, number), number, call, tag);
    const DeviceMessage& mine = p.messages[of];
    if (!seen || (call == mine.call && tag == mine.tag)) return true;
    const RecordedCalls calls{mine.call, call, mine.tag, tag};
    return give_up(p.group, FailureCause::kMismatch, peer, operation, kStageMessage, number, 0, 0, &calls);
  }

  // The next piece, which this channel then counts as moved.
  __device__ __forceinline__ Piece take_piece() {
    const DeviceMessage& m = p.messages[message];
    Piece piece;
    piece.peer = peer;
    piece.flag = flag();
    std::byte* data = m.data + m.cut.begin(words.lane, i);
    std::byte* ring = m.cut.lines ? words.lines(p.group, messages) : words.slot(p.group, slots);
    piece.mode = !m.cut.lines ? Mode::kCopy : kSends ? Mode::kSendLines : Mode::kTakeLines;
    piece.from = kSends ? data : ring;
    piece.to = kSends ? ring : data;
    piece.bytes = int(m.cut.bytes_of(words.lane, i));
    if (kSends && words.lane == 0 && i == 0) store_header(words.header(p.group, messages), messages, m.call, m.tag);
    if (!m.cut.lines) ++slots;
    if (++i == pieces) {
      ++messages;
      ++message;
      open();
    }
    return piece;
  }
};

}  // namespace mnnvl::kernels
