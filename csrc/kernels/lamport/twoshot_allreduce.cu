// All-reduce, two shots: scatter slices, each rank reduces its own and stores the result to all. Thread j serves packs
// j, j + step, ... of every rank's slice through all phases, so nothing inside a block waits for another thread.
#include "kernels/device/lamport.cuh"
#include "kernels/host/launch.cuh"

namespace mnnvl::kernels {
namespace {

template <typename T, int kWorld>
__global__ void __launch_bounds__(threads_of(kWorld), kMinBlocks)
    twoshot_lamport_allreduce(const __grid_constant__ AllReduceParams p) {
  grid_dependency_wait();
  const DeviceGroup& g = p.group;
  LamportCall call(g, Operation::kAllReduce);
  if (call.aborted()) return;

  const int world = kWorld ? kWorld : g.world_size;
  const int64_t bytes = p.numel * int64_t(sizeof(T));
  const int64_t slice = slice_packs(ceil_div(bytes, kPackBytes), world);
  const int64_t begin = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  const std::byte* in = static_cast<const std::byte*>(p.in);
  std::byte* out = static_cast<std::byte*>(p.out);
  // The k-th owner from this rank on, so that not all ranks turn to the same one first.
  const auto owner_of = [&](int k) { return g.rank + k < world ? g.rank + k : g.rank + k - world; };
  const auto load_own = [&](int64_t at) { return without_negative_zero<T>(load_pack<Unit<T>>(in + at, bytes - at)); };

  // Phase 1, scatter: pack j of owner o's slice to o's slot [rank].
  for (int64_t j = begin; j < slice; j += step) {
#pragma unroll
    for (int k = 1; k < world; ++k) {
      const int owner = owner_of(k);
      const int64_t at = (owner * slice + j) * kPackBytes;
      if (at >= bytes) continue;
      st_relaxed_sys_v4(g.peers[owner] + call.stage(0) + (g.rank * slice + j) * kPackBytes, load_own(at));
    }
  }
  call.advance();

  // Phase 2, reduce and broadcast: the rounded sum can be -0 again, which finish() turns into +0 before it is
  // published.
  constexpr bool kClearFirst = kWorld >= 2 && kWorld <= 4;  // larger worlds would spill
  const float divisor = p.op == ReduceOp::kAvg ? float(world) : 1.0f;
  for (int64_t j = begin; j < slice; j += step) {
    const int64_t at = (g.rank * slice + j) * kPackBytes;
    if (at >= bytes) break;
    Accumulator<T> acc;
    Wait wait(g, Operation::kAllReduce, /*stage=*/0, call.sequence());
    std::byte* first = g.peers[g.rank] + call.stage(0) + j * kPackBytes;
    if (!take_and_sum<T, kWorld, kClearFirst>(g, first, slice * kPackBytes, g.rank, load_own(at), wait, at / kPackBytes,
                                              acc))
      return;
    const uint4 sum = acc.finish(divisor);
    publish<kWorld>(g, call.stage(1) + at, sum);
    store_pack<Unit<T>>(out + at, bytes - at, sum);
  }

  // Phase 3, collect: the other owners' results. A multicast store has put the own result into the own slot too: that
  // copy is waited for and taken like the others, so that the slot is clear when this call ends.
  const int nearest = g.multicast == nullptr ? 1 : 0;
  for (int64_t j = begin; j < slice; j += step) {
#pragma unroll
    for (int k = 0; k < world; ++k) {
      const int owner = owner_of(k);
      const int64_t at = (owner * slice + j) * kPackBytes;
      if (k < nearest || at >= bytes) continue;
      Wait wait(g, Operation::kAllReduce, /*stage=*/1, call.sequence());
      uint4 sum;
      if (!take(g.peers[g.rank] + call.stage(1) + at, owner, wait, at / kPackBytes, sum)) return;
      store_pack<Unit<T>>(out + at, bytes - at, sum);
    }
  }
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
