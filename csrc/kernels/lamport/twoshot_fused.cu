// Fused all-reduce, two shots: rows are dealt out in slices, row j of rank o's slice is row o * slice + j. Its owner
// reduces it and stores the sum to all; every rank finishes every row, so that only the sum crosses the link.
#include "kernels/device/fused_row.cuh"
#include "kernels/device/lamport.cuh"
#include "kernels/host/launch.cuh"

namespace mnnvl::kernels {
namespace {

template <typename T, int kWorld>
__global__ void __launch_bounds__(kFusedThreads, kMinBlocks)
    twoshot_lamport_fused(const __grid_constant__ FusedParams p) {
  __shared__ typename FusedRow<T, kWorld>::Shared shared;
  grid_dependency_wait();
  const DeviceGroup& g = p.group;
  LamportCall call(g, Operation::kFusedAllReduce);
  // A thread that must not take part comes all the same, so that its cluster ends as one.
  const bool aborted = call.aborted();

  FusedRow<T, kWorld> fused(p.work, shared);
  const int world = kWorld ? kWorld : g.world_size, packs = fused.packs();
  const int rows = int(p.rows), slice = int(ceil_div(rows, world));  // a launch has fewer than 2^31 packs
  const auto owner_of = [&](int k) { return g.rank + k < world ? g.rank + k : g.rank + k - world; };
  const auto load_own = [&](int row, int i) {
    return without_negative_zero<T>(fused.load(p.in, p.first_row + row, i));
  };
  const auto offset = [&](int row, int i) { return int64_t(row * packs + i) * kPackBytes; };
  std::byte* const own = g.peers[g.rank];

  // Phase 1, scatter: every row that has another owner, to that one's slot [rank].
  const int step = fused.row_step();
  for (int j = fused.first_row(); j < slice && !aborted; j += step) {
    for (int k = 1; k < world; ++k) {
      const int owner = owner_of(k);
      if (owner * slice + j >= rows) continue;
      for (int i = fused.first_pack(); i < packs; i += fused.pack_step()) {
        st_relaxed_sys_v4(g.peers[owner] + call.stage(0) + offset(g.rank * slice + j, i),
                          load_own(owner * slice + j, i));
      }
    }
  }
  fused.prepare();
  call.advance();
  if (p.first_row == 0) fused.zero_padding();

  // Phase 2: reduce and broadcast own row j; then collect the other owners' rows j - step, which they have broadcast
  // meanwhile. In place too: what is written of the input has been scattered, or is read once more by the same thread
  // before. A multicast store has put the own sum into the own slot too: it is waited for and taken like the others, so
  // that the slot is clear when this call ends.
  for (int j = fused.first_row(); j < slice + step; j += step) {
    for (int k = 0; k < world; ++k) {
      const int owner = owner_of(k);
      const int number = k == 0 ? j : j - step;  // of the row in its owner's slice
      const int row = owner * slice + number;
      if (number < 0 || number >= slice || row >= rows) continue;
      const auto sum = [&](int i, uint4& pack) {
        const uint32_t index = uint32_t(row * packs + i);
        Wait wait(g, Operation::kFusedAllReduce, /*stage=*/k == 0 ? 0 : 1, call.sequence());
        pack = {};
        if (aborted) return false;
        std::byte* const result = own + call.stage(1) + offset(row, i);
        if (k != 0) return take(result, owner, wait, index, pack);
        Accumulator<T> acc;
        if (!take_and_sum<T, kWorld, /*kClearFirst=*/false>(g, own + call.stage(0) + offset(number, i),
                                                            int64_t(slice * packs) * kPackBytes, g.rank,
                                                            load_own(row, i), wait, index, acc)) {
          return false;
        }
        pack = acc.finish(1.0f);
        publish<kWorld>(g, call.stage(1) + offset(row, i), pack);
        return g.multicast == nullptr || take(result, owner, wait, index, pack);
      };
      if (!fused.finish(p.first_row + row, sum)) return;
    }
  }
}

void launch_instance(const FusedParams& params, const Launch& shape) {
#define MNNVL_LAUNCH(T, world) \
  if (params.work.dtype == dtype_of<T>() && instance_of(params.group.world_size) == world) \
    return launch(twoshot_lamport_fused<T, world>, params, params.blocks, shape);
  MNNVL_FOR_EACH_INSTANCE(MNNVL_LAUNCH)
#undef MNNVL_LAUNCH
}

void load_instances() {
#define MNNVL_LOAD(T, world) load(twoshot_lamport_fused<T, world>);
  MNNVL_FOR_EACH_INSTANCE(MNNVL_LOAD)
#undef MNNVL_LOAD
}

}  // namespace

namespace rows {
extern constexpr KernelTable::Row<FusedParams> twoshot_fused{"twoshot_lamport_fused", launch_instance, load_instances};
}

}  // namespace mnnvl::kernels
