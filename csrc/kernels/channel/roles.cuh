// Blocks that send and blocks that receive, for the kernels on pair channels.
//
// A block serves some lanes of some channels. Its signal warp has a thread for each of them: it looks which can move,
// hands pieces to the data warps through a queue in shared memory, and posts or credits them when the data warps have
// done with them, while these are at the next ones. Several are posted behind one fence. The block never stands still
// at one lane while another could move.
#pragma once

#include "kernels/channel/lane.cuh"

namespace mnnvl::kernels {

constexpr unsigned kAllThreads = 0xffffffffu;

constexpr int kDataWarps = kMaxExchangeThreads / kWarp - 1;
constexpr int kQueue = 8;  // pieces handed out and not yet posted

struct Shared {
  Piece pieces[kQueue];
  uint64_t handed[kQueue];  // mbarriers, one arrival each: the piece is there
  uint32_t done[kDataWarps];  // pieces that each data warp has done with
  uint32_t failed;
};

// How many pieces all data warps have done with. Whole signal warp.
__device__ __forceinline__ uint32_t pieces_done(const Shared& shared, uint32_t handed) {
  const uint32_t mine = threadIdx.x < kDataWarps ? handed - ld_acquire_cta_u32(&shared.done[threadIdx.x]) : 0;
  return handed - __reduce_max_sync(kAllThreads, mine);
}

// One thread of a block's signal warp; all 32 call each function together.
template <bool kSends, typename Params>
class Signal {
 public:
  __device__ __forceinline__ Signal(const Params& p, const Role& role, int block, Shared& shared)
      : p_(p),
        role_(role),
        shared_(shared),
        serves_(index(role, block) < role.channels * role.shape.lanes),
        lane_(p, p.channels[role.first_channel + (serves_ ? index(role, block) % role.channels : 0)],
              serves_ ? index(role, block) / role.channels : 0, serves_),
        wait_(p.group, role.operation, kSends ? kStageCredit : kStageMessage, 0) {}

  __device__ __forceinline__ void run() {
    begin();
    while (!failed_) {
      post_what_is_done();
      const unsigned active = __ballot_sync(kAllThreads, lane_.active());
      if (failed_ || (active == 0 && finished_ == handed_ && !__any_sync(kAllThreads, header_due_))) break;
      const unsigned can = __ballot_sync(kAllThreads, look(/*alone=*/!kSends && __popc(active) == 1));
      if (can != 0) hand_out(can);
      if (owes_credit_) {
        st_relaxed_sys_u64(lane_.words.credit, lane_.credit);
        owes_credit_ = false;
      }
      if (can == 0 && finished_ == handed_ && ok_ && (lane_.active() || header_due_)) {
        ok_ =
            wait_.keep_on(lane_.peer, kSends ? lane_.messages : lane_.slots + 1, kSends ? lane_.credit : lane_.posted);
      }
      failed_ = __any_sync(kAllThreads, !ok_);
    }
    end();
  }

 private:
  static __device__ __forceinline__ int index(const Role& role, int block) {
    return block + int(threadIdx.x) * role.shape.blocks;
  }

  __device__ __forceinline__ void begin() {
    const uint32_t abort = ld_relaxed_sys_u32(&control_of(p_.group, p_.group.rank)->abort);
    if (serves_) ok_ = lane_.load_state(role_.operation);
    if (abort != 0 && threadIdx.x == 0) {
      ok_ = give_up(p_.group, FailureCause::kPeerFailed, abort_rank(abort), role_.operation, kStageMessage,
                    lane_.messages, 0, 0);
    }
    failed_ = __any_sync(kAllThreads, !ok_);
    owes_credit_ = !kSends && serves_;
    wait_.restart(lane_.messages);
  }

  // What has been done since the last post goes behind one fence; a source waits for some pieces more, if they are
  // under way. What was taken before its header was there (it may have had no bytes to wait for) is credited when the
  // header has been seen: not before the message was sent.
  __device__ __forceinline__ void post_what_is_done() {
    const uint32_t done = pieces_done(shared_, handed_);
    __syncwarp();  // what some threads of this warp have acquired, all have
    failed_ = __any_sync(kAllThreads, ld_acquire_cta_u32(&shared_.failed) != 0);
    if (failed_ || (kSends && done != handed_ && done - finished_ < p_.group.layout.channel.posted_at_once())) return;
    for (; finished_ != done; ++finished_) {
      if (shared_.pieces[finished_ % kQueue].notifier != int(threadIdx.x)) continue;
      notice_ = shared_.pieces[finished_ % kQueue].notice;
      notice_due_ = true;
    }
    if (notice_due_ && !header_due_) {
      if (kSends) st_release_sys_u32(lane_.words.posted, uint32_t(notice_));
      if (!kSends) st_relaxed_sys_u64(lane_.words.credit, notice_);
      notice_due_ = false;
    }
    __syncwarp();
  }

  // Whether this thread's lane can move. A mismatch shows in ok_.
  __device__ __forceinline__ bool look(bool alone) {
    if constexpr (!kSends) {
      if (header_due_) {
        bool seen = false;
        ok_ = lane_.check_header(role_.operation, lane_.messages - 1, lane_.message - 1, seen);
        header_due_ = !seen;
      } else if (lane_.active() && lane_.words.lane == 0 && !lane_.begun) {
        ok_ = lane_.check_header(role_.operation, lane_.messages, lane_.message, lane_.begun);
      }
    }
    return ok_ && lane_.active() && !header_due_ && handed_ - finished_ < kQueue && lane_.ready(alone);
  }

  // The next in turn of those that can move.
  __device__ __forceinline__ void hand_out(unsigned can) {
    const unsigned behind = can & ~((2u << last_) - 1);
    last_ = __ffs(behind != 0 ? behind : can) - 1;
    if (int(threadIdx.x) == last_) {
      header_due_ = !kSends && lane_.words.lane == 0 && !lane_.begun;
      const bool lines = lane_.cut().lines;
      Piece piece = lane_.take_piece();
      // The credit of a kernel's last lines is left to the lane's next kernel: their sender rarely waits for it.
      piece.notifier = (kSends ? !lines : !lines || lane_.active()) ? last_ : -1;
      piece.notice = kSends ? lane_.slots : lane_.taken();
      shared_.pieces[handed_ % kQueue] = piece;
      mbarrier_arrive(&shared_.handed[handed_ % kQueue]);
      wait_.restart(lane_.messages);
    }
    ++handed_;
  }

  // Whatever is under way ends, by its own waits if need be; after a failure nothing of it is posted.
  __device__ __forceinline__ void end() {
    while (pieces_done(shared_, handed_) != handed_) {
    }
    if (threadIdx.x == 0) {
      shared_.pieces[handed_ % kQueue].mode = Mode::kStop;
      mbarrier_arrive(&shared_.handed[handed_ % kQueue]);
    }
    if (serves_ && !failed_) lane_.store_state();
  }

  const Params& p_;
  const Role& role_;
  Shared& shared_;
  const bool serves_;
  Lane<kSends, Params> lane_;
  Wait wait_;
  bool ok_ = true;  // this thread's
  bool failed_ = false;  // the same in all threads, as are the next three
  uint32_t handed_ = 0, finished_ = 0;  // pieces
  int last_ = 0;  // whose was handed out last
  bool header_due_ = false;  // of the last message, whose lines were handed out before it was there
  bool notice_due_ = false;  // of what is done
  uint64_t notice_ = 0;
  bool owes_credit_ = false;  // for what the lane's last kernel took
};

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

// A block's whole part in `role`; all its threads.
template <bool kSends, typename Params>
__device__ __forceinline__ void serve(const Params& p, const Role& role, int block, Shared& shared) {
  if (threadIdx.x < kDataWarps) shared.done[threadIdx.x] = 0;
  if (threadIdx.x < kQueue) mbarrier_init(&shared.handed[threadIdx.x], 1);
  if (threadIdx.x == 0) shared.failed = 0;
  __syncthreads();
  if (threadIdx.x >= kWarp) return data_warps(p, role.operation, shared);
  Signal<kSends, Params>(p, role, block, shared).run();
}

}  // namespace mnnvl::kernels
