// All-reduce, one shot: every rank stores its packs to every rank and reduces locally. One pack a thread.
#include "kernels/dispatch.cuh"
#include "kernels/lamport.cuh"

namespace mnnvl::kernels {
namespace {

template <typename T, int kWorld>
__global__ void __launch_bounds__(kMaxThreads) oneshot_lamport_allreduce(const __grid_constant__ AllReduceParams p) {
  grid_dependency_wait();
  const DeviceGroup& g = p.group;
  LamportCall call(g);
  if (call.aborted()) return;

  const int64_t bytes = p.numel * int64_t(sizeof(T));
  const int64_t packs = ceil_div(bytes, kPackBytes);
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const bool mine = i < packs;
  const int64_t slot_bytes = packs * kPackBytes;  // slot r holds rank r's packs
  const int64_t offset = call.stage(0) + i * kPackBytes;
  uint4 own{};

  // Phase 1: to slot [rank] of every peer; the own value stays in registers.
  if (mine) {
    const std::byte* in = static_cast<const std::byte*>(p.in) + i * kPackBytes;
    own = without_negative_zero<T>(load_pack<Unit<T>>(in, bytes - i * kPackBytes));
    publish<kWorld>(g, offset + g.rank * slot_bytes, own);
  }

  // Phase 2: while the packs travel, clear the dirty generation and advance the state.
  call.clear_and_advance(/*stage0_bytes=*/g.world_size * slot_bytes, /*stage1_bytes=*/0);
  if (!mine) return;

  // Phase 3: the data is the flag. Add in rank order, round once.
  Accumulator<T> acc;
  Wait wait(g, Operation::kAllReduce, /*stage=*/0, call.sequence());
  if (!await_and_sum<T, kWorld>(g, g.peers[g.rank] + offset, slot_bytes, own, wait, i, acc)) return;
  store_pack<Unit<T>>(static_cast<std::byte*>(p.out) + i * kPackBytes, bytes - i * kPackBytes,
                      acc.finish(p.op == ReduceOp::kAvg ? float(g.world_size) : 1.0f));
}

}  // namespace

void launch_oneshot_lamport_allreduce(const AllReduceParams& params, const Launch& shape) {
  const int64_t blocks = ceil_div(ceil_div(params.numel * element_size(params.dtype), kPackBytes), shape.threads);
#define MNNVL_LAUNCH(T, world) \
  if (params.dtype == dtype_of<T>() && instance_of(params.group.world_size) == world) \
    return launch(oneshot_lamport_allreduce<T, world>, params, blocks, shape);
  MNNVL_FOR_EACH_INSTANCE(MNNVL_LAUNCH)
#undef MNNVL_LAUNCH
}

void load_oneshot_lamport() {
#define MNNVL_LOAD(T, world) load(oneshot_lamport_allreduce<T, world>);
  MNNVL_FOR_EACH_INSTANCE(MNNVL_LOAD)
#undef MNNVL_LOAD
}

}  // namespace mnnvl::kernels
