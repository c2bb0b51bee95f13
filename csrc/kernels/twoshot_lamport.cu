// All-reduce, two shots: scatter slices, each rank reduces its own and stores the result to all. Thread j serves pack j of
// every rank's slice through all phases, so nothing inside a block waits for another thread.
#include "kernels/dispatch.cuh"
#include "kernels/lamport.cuh"

namespace mnnvl::kernels {
namespace {

template <typename T, int kWorld>
__global__ void __launch_bounds__(kMaxThreads) twoshot_lamport_allreduce(const __grid_constant__ AllReduceParams p) {
  grid_dependency_wait();
  const DeviceGroup& g = p.group;
  LamportCall call(g);
  if (call.aborted()) return;

  const int world = kWorld ? kWorld : g.world_size;
  const int64_t bytes = p.numel * int64_t(sizeof(T));
  const int64_t packs = ceil_div(bytes, kPackBytes);
  const int64_t slice = slice_packs(packs, world);
  const int64_t j = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const std::byte* in = static_cast<const std::byte*>(p.in);
  std::byte* out = static_cast<std::byte*>(p.out);
  const bool owns = j < slice && g.rank * slice + j < packs;
  uint4 own{};

  // Phase 1, scatter: pack j of owner o's slice to o's slot [rank]; the own slice stays in registers.
  if (j < slice) {
#pragma unroll
    for (int i = 0; i < world; ++i) {
      const int owner = g.rank + i < world ? g.rank + i : g.rank + i - world;
      const int64_t at = (owner * slice + j) * kPackBytes;
      if (at >= bytes) continue;
      const uint4 pack = without_negative_zero<T>(load_pack<Unit<T>>(in + at, bytes - at));
      if (i == 0) {
        own = pack;
      } else {
        st_relaxed_sys_v4(g.peers[owner] + call.stage(0) + (g.rank * slice + j) * kPackBytes, pack);
      }
    }
  }
  call.clear_and_advance(/*stage0_bytes=*/world * slice * kPackBytes, /*stage1_bytes=*/packs * kPackBytes);

  // Phase 2, reduce and broadcast: the rounded sum can be -0 again, which finish() turns into +0 before it is published.
  if (owns) {
    Accumulator<T> acc;
    Wait wait(g, Operation::kAllReduce, /*stage=*/0, call.sequence());
    const std::byte* first = g.peers[g.rank] + call.stage(0) + j * kPackBytes;
    const int64_t at = (g.rank * slice + j) * kPackBytes;
    if (!await_and_sum<T, kWorld>(g, first, slice * kPackBytes, own, wait, g.rank * slice + j, acc)) return;
    const uint4 sum = acc.finish(p.op == ReduceOp::kAvg ? float(world) : 1.0f);
    publish<kWorld>(g, call.stage(1) + at, sum);
    store_pack<Unit<T>>(out + at, bytes - at, sum);
  }

  // Phase 3: the other owners' results.
  if (j >= slice) return;
  Wait wait(g, Operation::kAllReduce, /*stage=*/1, call.sequence());
#pragma unroll
  for (int i = 1; i < world; ++i) {
    const int owner = g.rank + i < world ? g.rank + i : g.rank + i - world;
    const int64_t at = (owner * slice + j) * kPackBytes;
    if (at >= bytes) continue;
    const std::byte* result = g.peers[g.rank] + call.stage(1) + at;
    uint4 sum;
    while (has_sentinel(sum = ld_relaxed_sys_v4(result))) {
      if (!wait.keep_on(owner, owner * slice + j, kLamportSentinel)) return;
    }
    store_pack<Unit<T>>(out + at, bytes - at, sum);
  }
}

}  // namespace

void launch_twoshot_lamport_allreduce(const AllReduceParams& params, const Launch& shape) {
  const int64_t packs = ceil_div(params.numel * element_size(params.dtype), kPackBytes);
  const int64_t blocks = ceil_div(slice_packs(packs, params.group.world_size), shape.threads);
#define MNNVL_LAUNCH(T, world) \
  if (params.dtype == dtype_of<T>() && instance_of(params.group.world_size) == world) \
    return launch(twoshot_lamport_allreduce<T, world>, params, blocks, shape);
  MNNVL_FOR_EACH_INSTANCE(MNNVL_LAUNCH)
#undef MNNVL_LAUNCH
}

void load_twoshot_lamport() {
#define MNNVL_LOAD(T, world) load(twoshot_lamport_allreduce<T, world>);
  MNNVL_FOR_EACH_INSTANCE(MNNVL_LOAD)
#undef MNNVL_LOAD
}

}  // namespace mnnvl::kernels
