// Messages between pairs of ranks: any list of sends and receives in one launch, and copies of this rank beside them.
//
// Blocks have one of three roles: send, receive, copy. A block of the first two serves some lanes of some channels. Its
// signal warp has a thread for each of them: it looks which can move, hands pieces to the data warps through a queue in
// shared memory, and posts or credits them when the data warps have done with them, those of all its threads behind one
// fence, while the data warps are at the next ones. The block never stands still at one lane while another could move.
#include <algorithm>

#include "kernels/device/channel.cuh"
#include "kernels/host/launch.cuh"

namespace mnnvl::kernels {
namespace {

constexpr int kWarp = 32;
constexpr unsigned kAllThreads = 0xffffffffu;

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

constexpr int kDataWarps = kMaxExchangeThreads / kWarp - 1;
constexpr int kQueue = 4;  // pieces handed out and not yet posted

struct Shared {
  Piece pieces[kQueue];
  uint64_t handed[kQueue];    // mbarriers, one arrival each: the piece is there
  uint32_t done[kDataWarps];  // pieces that each data warp has done with
  uint32_t failed;
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

  // Whether a piece can move now. `alone`: no other channel of this block has anything left, so that lines may be waited
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
    return begun && (cut().lines || slots - uint32_t(credit >> 32) < kChannelSlots);
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

// How many pieces all data warps have done with. Whole signal warp.
__device__ __forceinline__ uint32_t pieces_done(const Shared& shared, uint32_t handed) {
  const uint32_t mine = threadIdx.x < kDataWarps ? handed - ld_acquire_cta_u32(&shared.done[threadIdx.x]) : 0;
  return handed - __reduce_max_sync(kAllThreads, mine);
}

template <bool kSends, typename Params>
__device__ __forceinline__ void signal_warp(const Params& p, const Role& role, int block, Shared& shared) {
  const int thread = threadIdx.x, index = block + thread * role.shape.blocks;
  const bool serves = index < role.channels * role.shape.lanes;
  const DeviceChannel& channel = p.channels[role.first_channel + (serves ? index % role.channels : 0)];
  Lane<kSends, Params> lane(p, channel, serves ? index / role.channels : 0, serves);
  const uint32_t stage = kSends ? kStageCredit : kStageMessage;
  Wait wait(p.group, role.operation, stage, 0);

  bool ok = true;
  const uint32_t abort = ld_relaxed_sys_u32(&control_of(p.group, p.group.rank)->abort);
  if (serves) ok = lane.load_state(role.operation);
  if (abort != 0 && thread == 0) {
    ok = give_up(p.group, FailureCause::kPeerFailed, abort_rank(abort), role.operation, stage, lane.messages, 0, 0);
  }
  bool failed = __any_sync(kAllThreads, !ok);
  bool owes_credit = !kSends && serves;  // for what the lane's last kernel took
  wait.restart(lane.messages);

  uint32_t handed = 0, finished = 0;  // pieces
  int last = 0;                       // whose was handed out last
  bool header_due = false;            // of the last message, whose lines were handed out before it was there
  while (!failed) {
    const uint32_t done = pieces_done(shared, handed);
    if (ld_acquire_cta_u32(&shared.failed) != 0) {
      failed = true;
      break;
    }
    if (done != finished) {
      uint64_t notice = 0;
      bool due = false;
      for (; finished != done; ++finished) {
        if (shared.pieces[finished % kQueue].notifier != thread) continue;
        notice = shared.pieces[finished % kQueue].notice;
        due = true;
      }
      if (due && kSends) st_release_sys_u32(lane.words.posted, uint32_t(notice));
      if (due && !kSends) st_release_sys_u64(lane.words.credit, notice);
      __syncwarp();
    }
    const unsigned active = __ballot_sync(kAllThreads, lane.active());
    if (active == 0 && finished == handed && !__any_sync(kAllThreads, header_due)) break;

    bool ready = false;
    if constexpr (!kSends) {
      if (header_due) {
        bool seen = false;
        ok = lane.check_header(role.operation, lane.messages - 1, lane.message - 1, seen);
        header_due = !seen;
      } else if (lane.active() && lane.words.lane == 0 && !lane.begun) {
        ok = lane.check_header(role.operation, lane.messages, lane.message, lane.begun);
      }
    }
    if (ok && lane.active() && !header_due && handed - finished < kQueue) {
      ready = lane.ready(/*alone=*/!kSends && __popc(active) == 1);
    }
    if (__any_sync(kAllThreads, !ok)) {
      failed = true;
      break;
    }
    const unsigned can = __ballot_sync(kAllThreads, ready);
    if (can != 0) {
      // The next in turn.
      const unsigned behind = can & ~((2u << last) - 1);
      last = __ffs(behind != 0 ? behind : can) - 1;
      if (thread == last) {
        header_due = !kSends && lane.words.lane == 0 && !lane.begun;
        const bool lines = lane.cut().lines;
        Piece piece = lane.take_piece();
        // The credit of a kernel's last lines is left to the lane's next kernel, which has no stores to wait for.
        piece.notifier = (kSends ? !lines : !lines || lane.active()) ? thread : -1;
        piece.notice = kSends ? lane.slots : lane.taken();
        shared.pieces[handed % kQueue] = piece;
        mbarrier_arrive(&shared.handed[handed % kQueue]);
        wait.restart(lane.messages);
      }
      ++handed;
    }
    if (owes_credit) {
      st_release_sys_u64(lane.words.credit, lane.credit);
      owes_credit = false;
    }
    if (can == 0 && finished == handed) {
      if (lane.active() || header_due) {
        ok = wait.keep_on(lane.peer, kSends ? lane.messages : lane.slots + 1, kSends ? lane.credit : lane.posted);
      }
      failed = __any_sync(kAllThreads, !ok);
    }
  }
  // Whatever is under way ends by its own waits; nothing of it is posted after a failure.
  while (pieces_done(shared, handed) != handed) {
  }
  if (thread == 0) {
    shared.pieces[handed % kQueue].mode = Mode::kStop;
    mbarrier_arrive(&shared.handed[handed % kQueue]);
  }
  if (serves && !failed) lane.store_state();
}

template <typename Unit>
__device__ __forceinline__ bool move_lines(const Piece& piece, int thread, int threads, Wait& wait) {
  if (piece.mode == Mode::kTakeLines) {
    return take_lines<Unit>(piece.from, piece.to, piece.bytes, piece.flag, thread, threads, wait, piece.peer);
  }
  send_lines<Unit>(piece.to, piece.from, piece.bytes, piece.flag, thread, threads);
  return true;
}

template <typename Params>
__device__ __forceinline__ void data_warps(const Params& p, Operation operation, Shared& shared) {
  const int thread = int(threadIdx.x) - kWarp, threads = int(blockDim.x) - kWarp;
  for (uint32_t k = 0;; ++k) {
    mbarrier_wait(&shared.handed[k % kQueue], k / kQueue);
    const Piece piece = shared.pieces[k % kQueue];
    if (piece.mode == Mode::kStop) return;
    if (piece.mode == Mode::kCopy) {
      copy_bytes(piece.to, piece.from, piece.bytes, thread, threads);
    } else {
      const std::byte* users = piece.mode == Mode::kTakeLines ? piece.to : piece.from;
      Wait wait(p.group, operation, kStageMessage, piece.flag - 1);
      const bool moved = reinterpret_cast<uintptr_t>(users) % kLineData == 0
                             ? move_lines<uint64_t>(piece, thread, threads, wait)
                             : move_lines<uint8_t>(piece, thread, threads, wait);
      if (!moved) st_release_cta_u32(&shared.failed, 1);
    }
    __syncwarp();
    if (thread % kWarp == 0) st_release_cta_u32(&shared.done[thread / kWarp], k + 1);
  }
}

template <typename Params>
__global__ void __launch_bounds__(kMaxExchangeThreads, kMinBlocks) exchange(const __grid_constant__ Params p) {
  __shared__ Shared shared;
  grid_dependency_wait();
  const int block = int(blockIdx.x), sends = p.sends.shape.blocks, moves = sends + p.receives.shape.blocks;
  if (block >= moves) {
    constexpr int64_t kStep = 32 << 10;
    for (int64_t at = int64_t(block - moves) * kStep; at < p.copy.bytes; at += int64_t(gridDim.x - moves) * kStep) {
      copy_bytes(static_cast<std::byte*>(p.copy.to) + at, static_cast<const std::byte*>(p.copy.from) + at,
                 int(min64(kStep, p.copy.bytes - at)), int(threadIdx.x), int(blockDim.x));
    }
    return;
  }
  if (threadIdx.x < kDataWarps) shared.done[threadIdx.x] = 0;
  if (threadIdx.x < kQueue) mbarrier_init(&shared.handed[threadIdx.x], 1);
  if (threadIdx.x == 0) shared.failed = 0;
  __syncthreads();
  const bool sending = block < sends;
  if (threadIdx.x >= kWarp) return data_warps(p, sending ? p.sends.operation : p.receives.operation, shared);
  if (sending) {
    signal_warp<true>(p, p.sends, block, shared);
  } else {
    signal_warp<false>(p, p.receives, block - sends, shared);
  }
}

constexpr int kFewMessages = 16;
using FewMessages = DeviceParams<kFewMessages, kFewMessages>;
using ManyMessages = DeviceParams<kMaxExchangeMessages, 2 * (kMaxWorldSize - 1)>;

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

template <typename Params>
void launch_as(const ExchangeParams& params, const Launch& shape) {
  Params p;
  p.group = params.group;
  p.kind = params.kind;
  p.copy = params.copy;
  p.sends.shape = params.send_shape;
  p.sends.operation = params.send_operation;
  p.receives.shape = params.receive_shape;
  p.receives.operation = params.receive_operation;
  int channels = 0, filled = 0;
  add_role(p, p.sends, params.sends, params.send_count, channels, filled);
  add_role(p, p.receives, params.receives, params.receive_count, channels, filled);
  const int blocks = params.send_shape.blocks + params.receive_shape.blocks + params.copy.blocks;
  launch(exchange<Params>, p, blocks, shape);
}

void launch_instance(const ExchangeParams& params, const Launch& shape) {
  if (params.send_count + params.receive_count <= kFewMessages) {
    return launch_as<FewMessages>(params, shape);
  }
  launch_as<ManyMessages>(params, shape);
}

void load_instances() {
  load(exchange<FewMessages>);
  load(exchange<ManyMessages>);
}

}  // namespace

namespace rows {
extern constexpr KernelTable::Row<ExchangeParams> exchange{"exchange", launch_instance, load_instances};
}

}  // namespace mnnvl::kernels
