// All-reduce, one shot: every rank stores its packs to every rank and reduces locally.
#include "kernels/device/lamport.cuh"
#include "kernels/host/launch.cuh"

namespace mnnvl::kernels {
namespace {

template <typename T, int kWorld>
__global__ void __launch_bounds__(threads_of(kWorld), kMinBlocks)
    oneshot_lamport_allreduce(const __grid_constant__ AllReduceParams p) {
  grid_dependency_wait();
  const DeviceGroup& g = p.group;
  LamportCall call(g, Operation::kAllReduce);

  const int64_t bytes = p.numel * int64_t(sizeof(T));
  const int64_t packs = ceil_div(bytes, kPackBytes);
  const int64_t begin = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  const int64_t slot_bytes = packs * kPackBytes;  // slot r holds rank r's packs
  const auto load_own = [&](int64_t i) {
    return without_negative_zero<T>(
        load_pack<Unit<T>>(static_cast<const std::byte*>(p.in) + i * kPackBytes, bytes - i * kPackBytes));
  };

  // Phase 1, publish: to slot [rank] of every peer; the first own pack, loaded beside this rank's state, stays in
  // registers.
  uint4 own{};
  if (begin < packs) own = load_own(begin);
  if (call.aborted()) return;
  for (int64_t i = begin; i < packs; i += step) {
    publish<kWorld>(g, call.stage(0) + g.rank * slot_bytes + i * kPackBytes, i == begin ? own : load_own(i));
  }
  call.advance();

  // Phase 2, take and reduce: the data is the flag. A multicast store fills the own slot too, so there the own pack is
  // waited for and taken like the others: nothing of this call may land in a slot that has been cleared.
  const int kept = g.multicast == nullptr ? g.rank : kNoRank;
  const float divisor = p.op == ReduceOp::kAvg ? float(g.world_size) : 1.0f;
  for (int64_t i = begin; i < packs; i += step) {
    if (i != begin) own = load_own(i);  // in place too: nobody else writes this pack of the output
    Accumulator<T> acc;
    Wait wait(g, Operation::kAllReduce, /*stage=*/0, call.sequence());
    std::byte* first = g.peers[g.rank] + call.stage(0) + i * kPackBytes;
    const auto slot = [&](int r) { return first + r * slot_bytes; };
    if (!take_and_sum<T, kWorld>(g, slot, kept, own, wait, i, acc)) return;
    store_pack<Unit<T>>(static_cast<std::byte*>(p.out) + i * kPackBytes, bytes - i * kPackBytes, acc.finish(divisor));
  }
}

void launch_instance(const AllReduceParams& params, const Launch& shape) {
#define MNNVL_LAUNCH(T, world) \
  if (params.dtype == dtype_of<T>() && instance_of(params.group.world_size) == world) \
    return launch(oneshot_lamport_allreduce<T, world>, params, params.blocks, shape);
  MNNVL_FOR_EACH_INSTANCE(MNNVL_LAUNCH)
#undef MNNVL_LAUNCH
}

void load_instances() {
#define MNNVL_LOAD(T, world) load(oneshot_lamport_allreduce<T, world>);
  MNNVL_FOR_EACH_INSTANCE(MNNVL_LOAD)
#undef MNNVL_LOAD
}

}  // namespace

namespace rows {
extern constexpr KernelTable::Row<AllReduceParams> oneshot_allreduce{"oneshot_lamport_allreduce", launch_instance,
                                                                     load_instances};
}

}  // namespace mnnvl::kernels
