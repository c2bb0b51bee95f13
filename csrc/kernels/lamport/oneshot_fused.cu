// Fused all-reduce, one shot: every rank stores its rows to every rank, and each block finishes its rows locally.
#include "kernels/device/fused_row.cuh"
#include "kernels/device/lamport.cuh"
#include "kernels/host/launch.cuh"

namespace mnnvl::kernels {
namespace {

template <typename T, int kWorld>
__global__ void __launch_bounds__(kFusedThreads, kMinBlocks)
    oneshot_lamport_fused(const __grid_constant__ FusedParams p) {
  __shared__ typename FusedRow<T, kWorld>::Shared shared;
  grid_dependency_wait();
  const DeviceGroup& g = p.group;
  LamportCall call(g, Operation::kFusedAllReduce);
  // A thread that must not take part comes all the same, so that its cluster ends as one.
  const bool aborted = call.aborted();

  FusedRow<T, kWorld> fused(p.work, shared);
  const int packs = fused.packs(), rows = int(p.rows);
  const int64_t slot_bytes = p.rows * packs * kPackBytes;  // slot r holds rank r's rows, each of whole packs
  const auto load_own = [&](int row, int i) {
    return without_negative_zero<T>(fused.load(p.in, p.first_row + row, i));
  };
  const auto offset = [&](int row, int i) { return (int64_t(row) * packs + i) * kPackBytes; };

  // Phase 1, publish.
  for (int row = fused.first_row(); row < rows && !aborted; row += fused.row_step()) {
    for (int i = fused.first_pack(); i < packs; i += fused.pack_step()) {
      publish<kWorld>(g, call.stage(0) + g.rank * slot_bytes + offset(row, i), load_own(row, i));
    }
  }
  fused.prepare();
  call.advance();
  if (p.first_row == 0) fused.zero_padding();

  // Phase 2, take, reduce, finish. In place too: a thread reads each pack of the input again before it, and nobody
  // else, writes there.
  const int kept = g.multicast == nullptr ? g.rank : kNoRank;
  for (int row = fused.first_row(); row < rows; row += fused.row_step()) {
    const auto sum = [&](int i, uint4& pack) {
      pack = {};
      if (aborted) return false;
      Accumulator<T> acc;
      Wait wait(g, Operation::kFusedAllReduce, /*stage=*/0, call.sequence());
      std::byte* first = g.peers[g.rank] + call.stage(0) + offset(row, i);
      if (!take_and_sum<T, kWorld, /*kClearFirst=*/false>(g, first, slot_bytes, kept, load_own(row, i), wait,
                                                          uint64_t(offset(row, i) / kPackBytes), acc)) {
        return false;
      }
      pack = acc.finish(1.0f);
      return true;
    };
    if (!fused.finish(p.first_row + row, sum)) return;
  }
}

// A group of one.
template <typename T>
__global__ void __launch_bounds__(kFusedThreads, kMinBlocks) fused_alone(const __grid_constant__ FusedParams p) {
  __shared__ typename FusedRow<T, 1>::Shared shared;
  grid_dependency_wait();
  FusedRow<T, 1> fused(p.work, shared);
  fused.prepare();
  if (p.first_row == 0) fused.zero_padding();
  for (int row = fused.first_row(); row < int(p.rows); row += fused.row_step()) {
    const auto sum = [&](int i, uint4& pack) {
      Accumulator<T> acc;
      acc.begin(fused.load(p.in, p.first_row + row, i));
      acc.add({});  // so that NaN and -0 become what they become in any sum
      pack = acc.finish(1.0f);
      return true;
    };
    if (!fused.finish(p.first_row + row, sum)) return;
  }
}

void launch_instance(const FusedParams& params, const Launch& shape) {
#define MNNVL_LAUNCH(T, world) \
  if (params.work.dtype == dtype_of<T>() && instance_of(params.group.world_size) == world) \
    return launch(oneshot_lamport_fused<T, world>, params, params.blocks, shape);
#define MNNVL_LAUNCH_ALONE(T) \
  if (params.work.dtype == dtype_of<T>() && params.group.world_size == 1) \
    return launch(fused_alone<T>, params, params.blocks, shape);
  MNNVL_FOR_EACH_INSTANCE(MNNVL_LAUNCH)
  MNNVL_LAUNCH_ALONE(float)
  MNNVL_LAUNCH_ALONE(__half)
  MNNVL_LAUNCH_ALONE(__nv_bfloat16)
#undef MNNVL_LAUNCH_ALONE
#undef MNNVL_LAUNCH
}

void load_instances() {
#define MNNVL_LOAD(T, world) load(oneshot_lamport_fused<T, world>);
  MNNVL_FOR_EACH_INSTANCE(MNNVL_LOAD)
#undef MNNVL_LOAD
  load(fused_alone<float>);
  load(fused_alone<__half>);
  load(fused_alone<__nv_bfloat16>);
}

}  // namespace

namespace rows {
extern constexpr KernelTable::Row<FusedParams> oneshot_fused{"oneshot_lamport_fused", launch_instance, load_instances};
}

}  // namespace mnnvl::kernels
