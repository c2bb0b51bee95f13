// All-reduce, two shots: scatter slices, each rank reduces its own and stores the result to all. A large tensor goes in
// windows (csrc/README.md), the next one scattered before the results of one are waited for. A thread serves the same
// positions of all slices in every window.
#include "kernels/device/windows.cuh"
#include "kernels/host/launch.cuh"

namespace mnnvl::kernels {
namespace {

// What all threads would reckon alike, and keep in registers, is here.
struct Params : AllReduceParams {
  int64_t bytes;
  uint32_t packs, slice;
  float divisor;

  explicit Params(const AllReduceParams& p)
      : AllReduceParams(p),
        bytes(p.numel * element_size(p.dtype)),
        packs(uint32_t(ceil_div(bytes, kPackBytes))),
        slice(uint32_t(slice_packs(packs, p.group.world_size))),
        divisor(p.op == ReduceOp::kAvg ? float(p.group.world_size) : 1.0f) {}
};

// Where the packs of a window lie in a stage. Without multicast no rank has a slot for what is its own: the first stage
// of `at` holds packs of every other source, the second one of every other owner.
template <int kWorld>
struct StageWindow {
  int64_t base;  // in every rank's workspace, of what would be position 0 of a slice
  uint32_t end;  // behind the last position
  uint32_t room;  // packs that a slot has room for
  bool own_slots;

  __device__ __forceinline__ int64_t place(int at, int from, uint32_t j) const {
    const int slot = own_slots ? from : kWorld == 2 ? 0 : from - (from > at ? 1 : 0);
    return base + int64_t(slot * room + j) * kPackBytes;
  }
};

// One thread's part in a window. It has kBatch packs under way at once, where they find room in its registers.
template <typename T, int kWorld>
class WindowPart {
 public:
  static constexpr bool kKept = false;

  __device__ __forceinline__ WindowPart(const Params& p, const LamportCall& call, int window)
      : p_(p), g_(p.group), call_(call), world_(kWorld ? kWorld : p.group.world_size) {
    begin(window);
  }
  __device__ __forceinline__ void begin(int window) {
    window_ = kWorld == 2 ? found_anew(window) : window;
    rank_ = found_anew(g_.rank);
  }

  // Of every other owner's slice, to its owner.
  __device__ __forceinline__ void scatter() const {
    const StageWindow<kWorld> at = stage_window(0);
    for (uint32_t j = first(); j < at.end; j += kBatch * step()) {
#pragma unroll
      for (int k = 1; k < world_; ++k) {
        const int owner = owner_of(k), count = count_of(at, owner, j);
        uint4 own[kBatch];
        load_own(owner * p_.slice + j, count, own);
#pragma unroll
        for (int n = 0; n < kBatch; ++n) {
          if (n < count) st_relaxed_sys_v4(g_.peers[owner] + at.place(owner, rank_, j + n * step()), own[n]);
        }
      }
    }
  }

  // The own slice: the rounded sum can be -0 again, which finish() turns into +0 before it is published. False if a
  // wait gave up, here and below.
  __device__ __forceinline__ bool reduce() const {
    constexpr bool kClearFirst = kWorld >= 2 && kWorld <= 4;  // larger worlds would spill
    const StageWindow<kWorld> at = stage_window(0);
    std::byte* const mine = g_.peers[rank_];
    for (uint32_t j = first(); j < at.end; j += kBatch * step()) {
      const int count = count_of(at, rank_, j);
      if (count == 0) break;
      const uint32_t pack = rank_ * p_.slice + j;
      uint4 own[kBatch], sums[kBatch];
      load_own(pack, count, own);
      Wait wait(g_, Operation::kAllReduce, /*stage=*/0, call_.sequence());
      const auto slot = [&](int r, int n) { return mine + at.place(rank_, r, j + n * step()); };
      if (!take_and_sum<T, kWorld, kClearFirst>(g_, slot, rank_, own, count, p_.divisor, wait, pack, sums)) {
        return false;
      }
      const uint32_t again = found_anew(j);
#pragma unroll
      for (int n = 0; n < kBatch; ++n) {
        if (n >= count) continue;
        broadcast(again + n * step(), sums[n]);
        store_sum(rank_ * p_.slice + again + n * step(), sums[n]);
      }
    }
    return true;
  }

  // The other owners' results. A multicast store has put the own result into the own slot too: that copy is waited for
  // and taken like the others, so that the slot is clear when this call ends.
  __device__ __forceinline__ bool collect() const {
    const StageWindow<kWorld> at = stage_window(1);
    for (uint32_t j = first(); j < at.end; j += kBatch * step()) {
#pragma unroll
      for (int k = 0; k < world_; ++k) {
        const int owner = owner_of(k), count = count_of(at, owner, j);
        if ((k == 0 && g_.multicast == nullptr) || count == 0) continue;
        Wait wait(g_, Operation::kAllReduce, /*stage=*/1, call_.sequence());
        std::byte* const slot = g_.peers[rank_] + at.place(rank_, owner, j);
        const uint32_t pack = owner * p_.slice + j;
        uint4 sums[kBatch];
        if (!take(slot, int64_t(step()) * kPackBytes, count, owner, wait, pack, sums)) return false;
        const uint32_t again = found_anew(pack);
#pragma unroll
        for (int n = 0; n < kBatch; ++n) {
          if (n < count) store_sum(again + n * step(), sums[n]);
        }
      }
    }
    return true;
  }

 private:
  static constexpr int kBatch = kWorld == 2 ? 2 : 1;
  __device__ __forceinline__ uint32_t first() const {
    return uint32_t(window_) * p_.windows.packs + blockIdx.x * blockDim.x + threadIdx.x;
  }
  __device__ __forceinline__ static uint32_t step() { return found_anew(gridDim.x * blockDim.x); }
  // The k-th owner from this rank on, so that not all ranks turn to the same one first.
  __device__ __forceinline__ int owner_of(int k) const { return rank_ + k < world_ ? rank_ + k : rank_ + k - world_; }
  __device__ __forceinline__ StageWindow<kWorld> stage_window(int stage) const {
    const uint32_t room = p_.windows.packs, begin = uint32_t(window_) * room;
    const bool own_slots = stage == 1 && g_.multicast != nullptr;
    const uint32_t before = uint32_t(window_ % kGenerationWindows) * (own_slots ? world_ : world_ - 1) * room;
    return {call_.stage(stage, window_ / kGenerationWindows) + (int64_t(before) - begin) * kPackBytes,
            room < p_.slice - begin ? begin + room : p_.slice, room, own_slots};
  }
  // Of the positions j, j + step, ... of an owner's slice, for how many of a batch there are packs in the window.
  __device__ __forceinline__ int count_of(const StageWindow<kWorld>& window, int owner, uint32_t j) const {
    int count = 0;
#pragma unroll
    for (int n = 0; n < kBatch; ++n) {
      const uint32_t at = j + n * step();
      count += at < window.end && owner * p_.slice + at < p_.packs ? 1 : 0;
    }
    return count;
  }
  __device__ __forceinline__ void load_own(uint32_t pack, int count, uint4 (&own)[kBatch]) const {
#pragma unroll
    for (int n = 0; n < kBatch; ++n) {
      if (n >= count) continue;
      const int64_t at = int64_t(pack + n * step()) * kPackBytes;
      own[n] = without_negative_zero<T>(load_pack<Unit<T>>(static_cast<const std::byte*>(p_.in) + at, p_.bytes - at));
    }
  }
  __device__ __forceinline__ void store_sum(uint32_t pack, uint4 sum) const {
    const int64_t at = int64_t(pack) * kPackBytes;
    store_pack<Unit<T>>(static_cast<std::byte*>(p_.out) + at, p_.bytes - at, sum);
  }
  __device__ __forceinline__ void broadcast(uint32_t j, uint4 sum) const {
    const StageWindow<kWorld> at = stage_window(1);
    if (g_.multicast != nullptr) {
      multimem_st_relaxed_sys_v4(g_.multicast + at.place(rank_, rank_, j), sum);
      return;
    }
#pragma unroll
    for (int k = 1; k < world_; ++k) {
      const int peer = owner_of(k);
      st_relaxed_sys_v4(g_.peers[peer] + at.place(peer, rank_, j), sum);
    }
  }

  const Params& p_;
  const DeviceGroup& g_;
  const LamportCall& call_;
  const int world_;
  int window_, rank_;
};

template <typename T, int kWorld>
__global__ void __launch_bounds__(whole_threads_of(kWorld), 1)
    twoshot_lamport_allreduce(const __grid_constant__ Params p) {
  grid_dependency_wait();
  LamportCall call(p.group, Operation::kAllReduce);
  run_windows<WindowPart<T, kWorld>>(p, call);
}

void launch_instance(const AllReduceParams& params, const Launch& shape) {
#define MNNVL_LAUNCH(T, world) \
  if (params.dtype == dtype_of<T>() && instance_of(params.group.world_size) == world) \
    return launch(twoshot_lamport_allreduce<T, world>, Params(params), params.blocks, shape);
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
