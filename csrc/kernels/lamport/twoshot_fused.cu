// Fused all-reduce, two shots: rows are dealt out in slices, row j of rank o's slice is row o * slice + j. Its owner
// reduces it and stores the sum to all; every rank finishes every row, so that only the sum crosses the link.
#include "kernels/device/fused_row.cuh"
#include "kernels/device/lamport.cuh"
#include "kernels/host/launch.cuh"

namespace mnnvl::kernels {
namespace {

template <typename T, int kWorld, Rows kRows>
__global__ void __launch_bounds__(kFusedThreads, kMinBlocks)
    twoshot_lamport_fused(const __grid_constant__ FusedParams p) {
  using Row = FusedRow<T, kWorld, kRows>;
  __shared__ typename Row::Shared shared;
  grid_dependency_wait();
  const DeviceGroup& g = p.group;
  LamportCall call(g, Operation::kFusedAllReduce);

  Row fused(p, shared);
  const int world = kWorld ? kWorld : g.world_size, packs = p.packs, batch_step = Row::kBatch * fused.pack_step();
  const int rows = p.rows, slice = int(ceil_div(rows, world));
  const int64_t apart = int64_t(fused.pack_step()) * kPackBytes, slot_bytes = int64_t(slice * packs) * kPackBytes;
  const auto owner_of = [&](int k) { return g.rank + k < world ? g.rank + k : g.rank + k - world; };
  const auto load_own = [&](int row, int i, uint4(&own)[Row::kBatch]) {
    fused.load(p.in, row, i, own);
#pragma unroll
    for (int n = 0; n < Row::kBatch; ++n) own[n] = without_negative_zero<T>(own[n]);
  };
  const auto offset = [&](int row, int i) { return int64_t(row * packs + i) * kPackBytes; };  // fewer than 2^31 packs
  std::byte* const own_workspace = g.peers[g.rank];

  fused.prepare();
  const bool aborted = call.aborted();  // such a thread comes all the same, so that its cluster ends as one
  // Phase 1, scatter: every row that has another owner, to that one's slot [rank].
  const int step = fused.row_step();
  for (int j = fused.first_row(); j < slice && !aborted; j += step) {
    for (int k = 1; k < world; ++k) {
      const int owner = owner_of(k);
      if (owner * slice + j >= rows) continue;
      for (int i = fused.first_pack(); i < packs; i += batch_step) {
        uint4 own[Row::kBatch];
        load_own(owner * slice + j, i, own);
        std::byte* const to = g.peers[owner] + call.stage(0) + offset(g.rank * slice + j, i);
#pragma unroll
        for (int n = 0; n < Row::kBatch; ++n) {
          if (n == 0 || n < fused.count_from(i)) st_relaxed_sys_v4(to + n * apart, own[n]);
        }
      }
    }
  }
  call.begin_advance();

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
      const auto sum = [&](int i, uint4(&sums)[Row::kBatch]) {
        const uint32_t index = uint32_t(row * packs + i);
        Wait wait(g, Operation::kFusedAllReduce, /*stage=*/k == 0 ? 0 : 1, call.sequence());
#pragma unroll
        for (uint4& pack : sums) pack = {};
        if (aborted) return false;
        const int count = fused.count_from(i);
        std::byte* const result = own_workspace + call.stage(1) + offset(row, i);
        if (k != 0) return take(result, apart, count, owner, wait, index, sums);
        uint4 own[Row::kBatch];
        load_own(row, i, own);
        std::byte* const first = own_workspace + call.stage(0) + offset(number, i);
        const auto slot = [&](int r, int n) { return first + n * apart + r * slot_bytes; };
        if (!take_and_sum<T, kWorld>(g, slot, g.rank, own, count, 1.0f, wait, index, sums)) return false;
#pragma unroll
        for (int n = 0; n < Row::kBatch; ++n) {
          if (n == 0 || n < count) publish<kWorld>(g, call.stage(1) + offset(row, i) + n * apart, sums[n]);
        }
        return g.multicast == nullptr || take(result, apart, count, owner, wait, index, sums);
      };
      if (!fused.finish(row, sum)) return call.end_advance();
    }
  }
  call.end_advance();
  if (p.first_row == 0) fused.zero_padding();
}

template <typename T, int kWorld, Rows kRows>
constexpr auto kernel_of() {
  constexpr int kInstance = kRows == Rows::kAny ? 0 : fused_instance<T>(kWorld);
  constexpr bool kHasNone = kRows == Rows::kTeams && !has_teams(kInstance);
  constexpr Rows kKind = kHasNone ? Rows::kPacked : kRows;
  return twoshot_lamport_fused<T, kInstance, kKind>;
}

void launch_instance(const FusedParams& params, const Launch& shape) {
  const auto launch_rows = [&](auto any, auto packed, auto teams) {
    launch(fits_teams(params) ? teams : params.packed ? packed : any, params, params.blocks, shape);
  };
#define MNNVL_LAUNCH(T, world) \
  if (params.work.dtype == dtype_of<T>() && instance_of(params.group.world_size) == world) { \
    return launch_rows(kernel_of<T, world, Rows::kAny>(), kernel_of<T, world, Rows::kPacked>(), \
                       kernel_of<T, world, Rows::kTeams>()); \
  }
  MNNVL_FOR_EACH_INSTANCE(MNNVL_LAUNCH)
#undef MNNVL_LAUNCH
}

void load_instances() {
#define MNNVL_LOAD(T, world) \
  load(kernel_of<T, world, Rows::kAny>()); \
  load(kernel_of<T, world, Rows::kPacked>()); \
  load(kernel_of<T, world, Rows::kTeams>());
  MNNVL_FOR_EACH_INSTANCE(MNNVL_LOAD)
#undef MNNVL_LOAD
}

}  // namespace

namespace rows {
extern constexpr KernelTable::Row<FusedParams> twoshot_fused{"twoshot_lamport_fused", launch_instance, load_instances};
}

}  // namespace mnnvl::kernels
