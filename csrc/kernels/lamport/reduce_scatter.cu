// Reduce-scatter, the first half of a two-shot all-reduce: every rank sends each other rank its part, and reduces its
// own. Thread j serves packs j, j + step, ... of every part.
#include "kernels/device/lamport.cuh"
#include "kernels/host/launch.cuh"

namespace mnnvl::kernels {
namespace {

template <typename T, int kWorld>
__global__ void __launch_bounds__(threads_of(kWorld), kMinBlocks)
    lamport_reduce_scatter(const __grid_constant__ ReduceScatterParams p) {
  grid_dependency_wait();
  const DeviceGroup& g = p.group;
  LamportCall call(g, Operation::kReduceScatter);
  if (call.aborted()) return;

  const int world = kWorld ? kWorld : g.world_size;
  const int64_t bytes = p.numel * int64_t(sizeof(T)), packs = ceil_div(bytes, kPackBytes);
  const int64_t begin = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  const auto load = [&](int part, int64_t at) {
    const auto* in = static_cast<const std::byte*>(p.ins[part]) + at;
    return without_negative_zero<T>(load_pack<Unit<T>>(in, bytes - at));
  };

  for (int64_t j = begin; j < packs; j += step) {
#pragma unroll
    for (int k = 1; k < world; ++k) {
      const int owner = g.rank + k < world ? g.rank + k : g.rank + k - world;
      st_relaxed_sys_v4(g.peers[owner] + call.stage(0) + (g.rank * packs + j) * kPackBytes,
                        load(owner, j * kPackBytes));
    }
  }
  call.advance();

  const float divisor = p.op == ReduceOp::kAvg ? float(world) : 1.0f;
  std::byte* out = static_cast<std::byte*>(p.out);
  for (int64_t j = begin; j < packs; j += step) {
    const int64_t at = j * kPackBytes;
    Accumulator<T> acc;
    Wait wait(g, Operation::kReduceScatter, /*stage=*/0, call.sequence());
    std::byte* first = g.peers[g.rank] + call.stage(0) + at;
    const auto slot = [&](int r) { return first + r * (packs * kPackBytes); };
    if (!take_and_sum<T, kWorld>(g, slot, g.rank, load(g.rank, at), wait, uint64_t(j), acc)) {
      return;
    }
    store_pack<Unit<T>>(out + at, bytes - at, acc.finish(divisor));
  }
}

void launch_instance(const ReduceScatterParams& params, const Launch& shape) {
#define MNNVL_LAUNCH(T, world) \
  if (params.dtype == dtype_of<T>() && instance_of(params.group.world_size) == world) \
    return launch(lamport_reduce_scatter<T, world>, params, params.blocks, shape);
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
