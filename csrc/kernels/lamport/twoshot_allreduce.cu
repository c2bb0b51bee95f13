// All-reduce, two shots: scatter slices, each rank reduces its own and stores the result to all. A thread serves packs
// j, j + step, ... of every rank's slice through all phases, so nothing inside a block waits for another thread.
//
// A large tensor is a chain of calls: each but the first scatters while the one before it still runs (csrc/README.md
// says why it may).
#include "kernels/device/lamport.cuh"
#include "kernels/host/launch.cuh"

namespace mnnvl::kernels {
namespace {

// Where a pack of a slice lies in a stage. Without multicast no rank has a slot for what is its own: the first stage of
// `at` holds a slice of every other source, the second one of every other owner.
struct StagePlaces {
  const int64_t stage;
  const uint32_t slice;  // packs
  const bool own_slots;

  __device__ __forceinline__ int64_t of(int at, int from, uint32_t j) const {
    return stage + int64_t((from - (!own_slots && from > at ? 1 : 0)) * slice + j) * kPackBytes;
  }
};

// One thread's part in a call. It has kBatch packs under way at once, where they find room in its registers.
template <typename T, int kWorld>
class TwoShot {
 public:
  __device__ __forceinline__ TwoShot(const AllReduceParams& p, const LamportCall& call)
      : p_(p),
        g_(p.group),
        sequence_(call.sequence()),
        world_(kWorld ? kWorld : p.group.world_size),
        bytes_(p.numel * int64_t(sizeof(T))),
        packs_(uint32_t(ceil_div(bytes_, kPackBytes))),
        slice_(uint32_t(slice_packs(packs_, world_))),
        scattered_{call.stage(0), slice_, false},
        collected_{call.stage(1), slice_, p.group.multicast != nullptr} {}

  // Pack j of owner o's slice to o.
  __device__ __forceinline__ void scatter() const {
    for (uint32_t j = begin(); j < slice_; j += kBatch * step()) {
#pragma unroll
      for (int k = 1; k < world_; ++k) {
        const int owner = owner_of(k), count = count_of(owner, j);
        uint4 own[kBatch];
        load_own(owner, j, count, own);
#pragma unroll
        for (int n = 0; n < kBatch; ++n) {
          if (n < count) st_relaxed_sys_v4(g_.peers[owner] + scattered_.of(owner, g_.rank, j + n * step()), own[n]);
        }
      }
    }
  }

  // The own slice: the rounded sum can be -0 again, which finish() turns into +0 before it is published. False if a
  // wait gave up, here and below.
  __device__ __forceinline__ bool reduce_and_broadcast() const {
    constexpr bool kClearFirst = kWorld >= 2 && kWorld <= 4;  // larger worlds would spill
    const float divisor = p_.op == ReduceOp::kAvg ? float(world_) : 1.0f;
    std::byte* const mine = g_.peers[g_.rank];
    for (uint32_t j = begin(); j < slice_; j += kBatch * step()) {
      const int count = count_of(g_.rank, j);
      if (count == 0) break;
      uint4 own[kBatch], sums[kBatch];
      load_own(g_.rank, j, count, own);
      Wait wait(g_, Operation::kAllReduce, /*stage=*/0, sequence_);
      const auto slot = [&](int r, int n) { return mine + scattered_.of(g_.rank, r, j + n * step()); };
      const uint32_t pack = g_.rank * slice_ + j;
      if (!take_and_sum<T, kWorld, kClearFirst>(g_, slot, g_.rank, own, count, divisor, wait, pack, sums)) return false;
#pragma unroll
      for (int n = 0; n < kBatch; ++n) {
        if (n >= count) continue;
        broadcast(j + n * step(), sums[n]);
        store_sum(pack + n * step(), sums[n]);
      }
    }
    return true;
  }

  // The other owners' results. A multicast store has put the own result into the own slot too: that copy is waited for
  // and taken like the others, so that the slot is clear when this call ends.
  __device__ __forceinline__ bool collect() const {
    for (uint32_t j = begin(); j < slice_; j += kBatch * step()) {
#pragma unroll
      for (int k = 0; k < world_; ++k) {
        const int owner = owner_of(k), count = count_of(owner, j);
        if ((k == 0 && g_.multicast == nullptr) || count == 0) continue;
        Wait wait(g_, Operation::kAllReduce, /*stage=*/1, sequence_);
        std::byte* const first = g_.peers[g_.rank] + collected_.of(g_.rank, owner, j);
        const uint32_t pack = owner * slice_ + j;
        uint4 sums[kBatch];
        if (!take(first, int64_t(step()) * kPackBytes, count, owner, wait, pack, sums)) return false;
#pragma unroll
        for (int n = 0; n < kBatch; ++n) {
          if (n < count) store_sum(pack + n * step(), sums[n]);
        }
      }
    }
    return true;
  }

 private:
  static constexpr int kBatch = kWorld == 2 ? 2 : 1;

  __device__ __forceinline__ static uint32_t begin() { return blockIdx.x * blockDim.x + threadIdx.x; }
  __device__ __forceinline__ static uint32_t step() { return gridDim.x * blockDim.x; }
  // The k-th owner from this rank on, so that not all ranks turn to the same one first.
  __device__ __forceinline__ int owner_of(int k) const {
    return g_.rank + k < world_ ? g_.rank + k : g_.rank + k - world_;
  }
  // Of the packs j, j + step, ... of an owner's slice, how many of a batch there are.
  __device__ __forceinline__ int count_of(int owner, uint32_t j) const {
    int count = 0;
#pragma unroll
    for (int n = 0; n < kBatch; ++n) {
      const uint32_t at = j + n * step();
      count += at < slice_ && owner * slice_ + at < packs_ ? 1 : 0;
    }
    return count;
  }
  __device__ __forceinline__ void load_own(int owner, uint32_t j, int count, uint4 (&own)[kBatch]) const {
#pragma unroll
    for (int n = 0; n < kBatch; ++n) {
      if (n >= count) continue;
      const int64_t at = int64_t(owner * slice_ + j + n * step()) * kPackBytes;
      const auto* const from = static_cast<const std::byte*>(p_.in) + at;
      own[n] = without_negative_zero<T>(load_pack<Unit<T>, /*kPastCache=*/true>(from, bytes_ - at));
    }
  }
  __device__ __forceinline__ void store_sum(uint32_t pack, uint4 sum) const {
    const int64_t at = int64_t(pack) * kPackBytes;
    store_pack<Unit<T>>(static_cast<std::byte*>(p_.out) + at, bytes_ - at, sum);
  }
  __device__ __forceinline__ void broadcast(uint32_t j, uint4 sum) const {
    if (g_.multicast != nullptr) {
      multimem_st_relaxed_sys_v4(g_.multicast + collected_.of(g_.rank, g_.rank, j), sum);
      return;
    }
#pragma unroll
    for (int k = 1; k < world_; ++k) {
      const int peer = owner_of(k);
      st_relaxed_sys_v4(g_.peers[peer] + collected_.of(peer, g_.rank, j), sum);
    }
  }

  const AllReduceParams& p_;
  const DeviceGroup& g_;
  const uint32_t sequence_;
  const int world_;
  const int64_t bytes_;
  const uint32_t packs_, slice_;
  const StagePlaces scattered_, collected_;
};

template <typename T, int kWorld>
__global__ void __launch_bounds__(threads_of(kWorld), kMinBlocks)
    twoshot_lamport_allreduce(const __grid_constant__ AllReduceParams p) {
  if (!p.chain.early) grid_dependency_wait();
  LamportCall call(p.group, Operation::kAllReduce);
  if (call.aborted()) return grid_dependency_wait();  // nothing of this stream may run beside the call before
  const TwoShot<T, kWorld> part(p, call);
  part.scatter();
  if (p.chain.early) {
    grid_dependency_wait();
    if (!call.confirm()) return;
  }
  call.advance(p.chain.more);
  if (part.reduce_and_broadcast()) part.collect();
}

void launch_instance(const AllReduceParams& params, const Launch& shape) {
#define MNNVL_LAUNCH(T, world) \
  if (params.dtype == dtype_of<T>() && instance_of(params.group.world_size) == world) \
    return launch(twoshot_lamport_allreduce<T, world>, params, params.blocks, shape);
  MNNVL_FOR_EACH_INSTANCE(MNNVL_LAUNCH)
#undef MNNVL_LAUNCH
}

void load_instances() {
#define MNNVL_LOAD(T, world) load(twoshot_lamport_allreduce<T, world>);
  MNNVL_FOR_EACH_INSTANCE(MNNVL_LOAD)
#undef MNNVL_LOAD
}

}  // namespace

namespace rows {
extern constexpr KernelTable::Row<AllReduceParams> twoshot_allreduce{"twoshot_lamport_allreduce", launch_instance,
                                                                     load_instances};
}

}  // namespace mnnvl::kernels
