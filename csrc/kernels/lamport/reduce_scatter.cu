// Reduce-scatter, the first half of a two-shot all-reduce: every rank sends each other rank its part, and reduces its
// own. In windows, like the two-shot.
#include "kernels/device/windows.cuh"
#include "kernels/host/launch.cuh"

namespace mnnvl::kernels {
namespace {

// What all threads would reckon alike, and keep in registers, is here.
struct Params : ReduceScatterParams {
  int64_t bytes;  // of a part
  uint32_t packs;
  float divisor;

  explicit Params(const ReduceScatterParams& p)
      : ReduceScatterParams(p),
        bytes(p.numel * element_size(p.dtype)),
        packs(uint32_t(ceil_div(bytes, kPackBytes))),
        divisor(p.op == ReduceOp::kAvg ? float(p.group.world_size) : 1.0f) {}
};

// One thread's part in a window: the positions first(), first() + step(), ... of every part.
template <typename T, int kWorld>
class WindowPart {
 public:
  static constexpr bool kKept = true;

  __device__ __forceinline__ WindowPart(const Params& p, const LamportCall& call, int window)
      : p_(p), g_(p.group), call_(call), world_(kWorld ? kWorld : p.group.world_size) {
    begin(window);
  }
  __device__ __forceinline__ void begin(int window) {
    window_ = window;
    rank_ = found_anew(g_.rank);
    base_ = call_.stage(0, window / kGenerationWindows) +
            (int64_t(window % kGenerationWindows * (world_ - 1)) - window) * p_.windows.packs * kPackBytes;
  }

  // Of every other owner's part, to its owner.
  __device__ __forceinline__ void scatter() const {
    for (uint32_t j = first(); j < end(); j += step()) {
#pragma unroll
      for (int k = 1; k < world_; ++k) {
        const int owner = rank_ + k < world_ ? rank_ + k : rank_ + k - world_;
        st_relaxed_sys_v4(g_.peers[owner] + place(owner, rank_, j), load(owner, j));
      }
    }
  }

  // The own part. False if a wait gave up.
  __device__ __forceinline__ bool reduce() const {
    std::byte* const mine = g_.peers[rank_];
    for (uint32_t j = first(); j < end(); j += step()) {
      Accumulator<T> acc;
      Wait wait(g_, Operation::kReduceScatter, /*stage=*/0, call_.sequence());
      const auto slot = [&](int r) { return mine + place(rank_, r, j); };
      if (!take_and_sum<T, kWorld>(g_, slot, rank_, load(rank_, j), wait, j, acc)) return false;
      const int64_t at = int64_t(j) * kPackBytes;
      store_pack<Unit<T>>(static_cast<std::byte*>(p_.out) + at, p_.bytes - at, acc.finish(p_.divisor));
    }
    return true;
  }
  __device__ __forceinline__ bool collect() const { return true; }

 private:
  __device__ __forceinline__ uint32_t first() const {
    return uint32_t(window_) * p_.windows.packs + blockIdx.x * blockDim.x + threadIdx.x;
  }
  __device__ __forceinline__ uint32_t end() const {
    const uint32_t begin = uint32_t(window_) * p_.windows.packs;
    return p_.windows.packs < p_.packs - begin ? begin + p_.windows.packs : p_.packs;
  }
  __device__ __forceinline__ static uint32_t step() { return gridDim.x * blockDim.x; }
  // No rank has a slot for what is its own.
  __device__ __forceinline__ int64_t place(int at, int from, uint32_t j) const {
    const int slot = kWorld == 2 ? 0 : from - (from > at ? 1 : 0);
    return base_ + (int64_t(slot) * p_.windows.packs + j) * kPackBytes;
  }
  __device__ __forceinline__ uint4 load(int part, uint32_t j) const {
    const int64_t at = int64_t(j) * kPackBytes;
    return without_negative_zero<T>(
        load_pack<Unit<T>>(static_cast<const std::byte*>(p_.ins[part]) + at, p_.bytes - at));
  }

  const Params& p_;
  const DeviceGroup& g_;
  const LamportCall& call_;
  const int world_;
  int window_, rank_;
  int64_t base_;  // in every rank's workspace, of what would be position 0 of a part in the first slot
};

template <typename T, int kWorld>
__global__ void __launch_bounds__(whole_threads_of(kWorld), 1)
    lamport_reduce_scatter(const __grid_constant__ Params p) {
  grid_dependency_wait();
  LamportCall call(p.group, Operation::kReduceScatter);
  run_windows<WindowPart<T, kWorld>>(p, call);
}

void launch_instance(const ReduceScatterParams& params, const Launch& shape) {
#define MNNVL_LAUNCH(T, world) \
  if (params.dtype == dtype_of<T>() && instance_of(params.group.world_size) == world) \
    return launch(lamport_reduce_scatter<T, world>, Params(params), params.blocks, shape);
  MNNVL_FOR_EACH_INSTANCE(MNNVL_LAUNCH)
#undef MNNVL_LAUNCH
}

void load_instances() {
#define MNNVL_LOAD(T, world) load(lamport_reduce_scatter<T, world>);
  MNNVL_FOR_EACH_INSTANCE(MNNVL_LOAD)
#undef MNNVL_LOAD
}

}  // namespace

namespace rows {
extern constexpr KernelTable::Row<ReduceScatterParams> reduce_scatter{"lamport_reduce_scatter", launch_instance,
                                                                      load_instances};
}

}  // namespace mnnvl::kernels
