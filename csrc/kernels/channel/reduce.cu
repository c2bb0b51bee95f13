// A reduction over all ranks: this rank's own values and a message of every peer, combined in rank order, and messages
// of its own to the peers. Blocks send (roles.cuh) or reduce.
//
// A block that reduces serves one lane of the channels of all peers, which cut their messages alike. Each thread of its
// signal warps watches one peer: it hands the data warps that peer's part of a piece, and gives credit when they have
// done with it. An mbarrier for each entry of the queue says that all peers' parts are there, another that the data
// warps are done.
#include "kernels/channel/roles.cuh"
#include "kernels/device/reduction.cuh"
#include "kernels/host/launch.cuh"

namespace mnnvl::kernels {
namespace {

using DeviceMessages = DeviceParams<2 * (kMaxWorldSize - 1), 2 * (kMaxWorldSize - 1)>;
struct Params : DeviceMessages {
  Dtype dtype;
  ReduceOp op;  // kSum for an average
  int divisor;  // of a sum
  const std::byte* own;
  std::byte* out;
};

constexpr int kEntries = 4;  // pieces handed out and not yet reduced

struct SharedReduction {
  Sources sources[kEntries];
  uint64_t handed[kEntries];  // mbarriers, an arrival for each peer: its part is there
  uint64_t done[kEntries];  // mbarriers, an arrival for each data warp
  uint32_t failed;
};

// One thread of the signal warps: a peer's channel, in the lane of this block.
class Watch {
 public:
  __device__ __forceinline__ Watch(const Params& p, int peer_index, int lane, SharedReduction& shared)
      : shared_(shared),
        lane_(p, p.channels[p.receives.first_channel + peer_index], lane, /*serves=*/true),
        wait_(p.group, p.receives.operation, kStageMessage, 0) {}

  __device__ __forceinline__ void run() {
    begin();
    const bool lines = lane_.cut().lines, watches_header = lane_.words.lane == 0;
    const int pieces = lane_.pieces, of = lane_.message;
    const uint64_t message = lane_.messages;
    const uint32_t slots = lane_.slots;
    for (int k = 0; k < pieces; ++k) {
      if (!lines) await_piece(k, pieces, message, slots);
      // The entry is free when the data warps are done with what was in it.
      while (taken_ <= k - kEntries) await_done(lines, pieces, message, slots);
      hand_out(k);
      give_owed();
    }
    // Lines are waited for by the data warps, meanwhile.
    while (lines && watches_header && !lane_.begun && !failed()) {
      if (!lane_.check_header(operation(), message, of, lane_.begun) ||
          (!lane_.begun && !wait_.keep_on(lane_.peer, message + 1, message))) {
        fail();
      }
    }
    while (taken_ < pieces) await_done(lines, pieces, message, slots);
    if (!failed()) lane_.store_state();
  }

 private:
  __device__ __forceinline__ Operation operation() const { return lane_.p.receives.operation; }
  __device__ __forceinline__ bool failed() const { return ld_acquire_cta_u32(&shared_.failed) != 0; }
  __device__ __forceinline__ void fail() { st_release_cta_u32(&shared_.failed, 1); }

  __device__ __forceinline__ void begin() {
    const DeviceGroup& g = lane_.p.group;
    const uint32_t abort = ld_relaxed_sys_u32(&control_of(g, g.rank)->abort);
    bool ok = lane_.load_state(operation());
    if (ok && abort != 0) {
      ok = give_up(g, FailureCause::kPeerFailed, abort_rank(abort), operation(), kStageMessage, lane_.messages, 0, 0);
    }
    if (!ok) {
      lane_.open();  // all the same: the data warps count on every peer's part of every piece
      fail();
    } else {
      owed_ = lane_.credit;
      owes_credit_ = true;
    }
    wait_.restart(lane_.messages);
  }

  // Until the peer has filled the slot of piece k, or somebody has given up. Gives credit meanwhile.
  __device__ __forceinline__ void await_piece(int k, int pieces, uint64_t message, uint32_t slots) {
    while (!failed()) {
      if (lane_.words.lane == 0 && !lane_.begun &&
          !lane_.check_header(operation(), message, lane_.message, lane_.begun)) {
        return fail();
      }
      if (lane_.ready(/*alone=*/false)) return wait_.restart(message);
      give_owed();
      if (taken_ < k && mbarrier_is_over(&shared_.done[taken_ % kEntries], uint32_t(taken_ / kEntries))) {
        take(/*lines=*/false, pieces, message, slots);
      } else if (!wait_.keep_on(lane_.peer, lane_.slots + 1, lane_.posted)) {
        return fail();
      }
    }
  }

  __device__ __forceinline__ void hand_out(int k) {
    const Piece piece = lane_.take_piece();
    Sources& sources = shared_.sources[k % kEntries];
    sources.at[lane_.peer] = piece.from;
    sources.flags[lane_.peer] = piece.flag;
    const DeviceGroup& g = lane_.p.group;
    if (threadIdx.x == 0) sources.at[g.rank] = lane_.p.own + (piece.to - lane_.p.out);
    mbarrier_arrive(&shared_.handed[k % kEntries]);
  }

  __device__ __forceinline__ void await_done(bool lines, int pieces, uint64_t message, uint32_t slots) {
    // Not by mbarrier_wait(), which may sleep: the data warps may be waiting for a peer that another thread of this
    // warp watches.
    while (!mbarrier_is_over(&shared_.done[taken_ % kEntries], uint32_t(taken_ / kEntries))) {
    }
    take(lines, pieces, message, slots);
  }

  // The data warps are done with one piece more. The credit of lines is left to the lane's next kernel.
  __device__ __forceinline__ void take(bool lines, int pieces, uint64_t message, uint32_t slots) {
    ++taken_;
    if (lines || failed()) return;
    const uint32_t messages = uint32_t(message) + (taken_ == pieces ? 1 : 0);
    st_relaxed_sys_u64(lane_.words.credit, uint64_t(slots + uint32_t(taken_)) << 32 | messages);
  }

  // For what the lane's last kernel took; the first piece goes before.
  __device__ __forceinline__ void give_owed() {
    if (owes_credit_) st_relaxed_sys_u64(lane_.words.credit, owed_);
    owes_credit_ = false;
  }

  SharedReduction& shared_;
  Lane<false, Params> lane_;
  Wait wait_;
  bool owes_credit_ = false;
  uint64_t owed_ = 0;
  int taken_ = 0;  // pieces that the data warps are done with, as far as this thread knows
};

// A data warp's part in all pieces of the lane. In flight: packs of slots, of two ranks and of more; lines.
template <Dtype dtype, int kOfTwo, int kOfMore, int kLines, typename Op>
__device__ __forceinline__ void reduce_all(const Params& p, int lane, SharedReduction& shared, const Op& op, int thread,
                                           int threads) {
  const Cut& cut = p.messages[p.channels[p.receives.first_channel].first].cut;
  const int rank = p.group.rank, world = p.group.world_size;
  const auto handed = [&](int k) {
    mbarrier_wait(&shared.handed[k % kEntries], uint32_t(k / kEntries));
    return ld_acquire_cta_u32(&shared.failed) == 0;
  };
  const auto done = [&](int k) {
    __syncwarp();
    if (thread % kWarp == 0) mbarrier_arrive(&shared.done[k % kEntries]);
  };
  if (cut.lines) {
    const int64_t begin = cut.begin(lane, 0);
    Wait wait(p.group, p.receives.operation, kStageMessage, 0);
    if (!reduce_lines<dtype, kLines>(shared.sources[0], p.own + begin, rank, world, p.out + begin,
                                     int(cut.bytes_of(lane, 0)), op, thread, threads, wait,
                                     [&] { return handed(0); })) {
      st_release_cta_u32(&shared.failed, 1);
    }
    return done(0);
  }
  const int pieces = cut.pieces_of(lane);
#pragma unroll 1
  for (int k = 0; k < pieces; ++k) {
    if (handed(k)) {
      reduce_piece<dtype, kOfTwo, kOfMore>(shared.sources[k % kEntries], rank, world, p.out + cut.begin(lane, k),
                                           int(cut.bytes_of(lane, k)), op, thread, threads);
    }
    done(k);
  }
}

// The sums that models are trained with have code of their own; of the others each dtype has. The loop over pieces lies
// inside each case: around the cases it would keep the invariants of all of them in registers.
#define MNNVL_FOR_EACH_FAST_SUM(X) X(kFloat32, sum) X(kFloat16, sum) X(kBFloat16, sum)
#define MNNVL_FOR_EACH_REDUCED_DTYPE(X) MNNVL_FOR_EACH_NUMBER(X, any) X(kBool, any)

__device__ __forceinline__ void data_warps(const Params& p, int lane, SharedReduction& shared, int thread,
                                           int threads) {
  if (p.op == ReduceOp::kSum) {
    const Fixed<ReduceOp::kSum> sum{p.divisor};
#define MNNVL_CASE(dtype, op) \
  case Dtype::dtype: return reduce_all<Dtype::dtype, 7, 2, 5>(p, lane, shared, sum, thread, threads);
    switch (p.dtype) {
      MNNVL_FOR_EACH_FAST_SUM(MNNVL_CASE)
      default: break;
    }
#undef MNNVL_CASE
  }
  const Any op{p.divisor, p.op};
#define MNNVL_CASE(dtype, unused) \
  case Dtype::dtype: return reduce_all<Dtype::dtype, 1, 1, 2>(p, lane, shared, op, thread, threads);
  switch (p.dtype) {
    MNNVL_FOR_EACH_REDUCED_DTYPE(MNNVL_CASE)
    default: break;
  }
#undef MNNVL_CASE
}

__global__ void __launch_bounds__(kMaxExchangeThreads, kMinBlocks) reduce(const __grid_constant__ Params p) {
  __shared__ Shared sending;
  __shared__ SharedReduction shared;
  grid_dependency_wait();
  const int block = int(blockIdx.x), sends = p.sends.shape.blocks;
  if (block < sends) return serve<true>(p, p.sends, block, sending);
  const int peers = p.receives.channels, watching = int(align_up(peers, kWarp)), thread = int(threadIdx.x);
  if (thread < kEntries) {
    mbarrier_init(&shared.handed[thread], uint32_t(peers));
    mbarrier_init(&shared.done[thread], uint32_t((int(blockDim.x) - watching) / kWarp));
  }
  if (thread == 0) shared.failed = 0;
  __syncthreads();
  const int lane = block - sends;
  if (thread >= watching) return data_warps(p, lane, shared, thread - watching, int(blockDim.x) - watching);
  if (thread < peers) Watch(p, thread, lane, shared).run();
}

void launch_instance(const ReduceParams& params, const Launch& shape) {
  const int rank = params.group.rank, world = params.group.world_size;
  Params p;
  p.group = params.group;
  p.kind = ChannelKind::kCollective;
  p.sends.shape = params.send_shape;
  p.sends.operation = p.receives.operation = params.operation;
  p.dtype = params.dtype;
  p.op = arithmetic::computed(params.dtype, params.op);
  p.divisor = 1;
  if (p.op == ReduceOp::kAvg) {
    p.op = ReduceOp::kSum;
    p.divisor = world;
  }
  p.own = static_cast<const std::byte*>(params.own);
  p.out = static_cast<std::byte*>(params.out);
  ChannelMessage receives[kMaxWorldSize];
  int count = 0;
  for (int peer = 0; params.bytes > 0 && peer < world; ++peer) {
    if (peer != rank) receives[count++] = {params.out, params.bytes, params.call, 0, peer};
  }
  int channels = 0, filled = 0;
  add_role(p, p.sends, params.sends, params.send_count, channels, filled);
  add_role(p, p.receives, receives, count, channels, filled);
  const int lanes = count == 0 ? 0 : Cut::make(params.group.layout.channel, params.bytes).lanes;
  p.receives.shape = {lanes, lanes};
  launch(reduce, p, params.send_shape.blocks + lanes, shape);
}

void load_instances() { load(reduce); }

}  // namespace

namespace rows {
extern constexpr KernelTable::Row<ReduceParams> reduce{"reduce", launch_instance, load_instances};
}

}  // namespace mnnvl::kernels
