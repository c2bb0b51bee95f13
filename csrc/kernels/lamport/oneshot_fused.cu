// Fused all-reduce, one shot: every rank stores its rows to every rank, and each block finishes its rows locally.
#include "kernels/device/fused_row.cuh"
#include "kernels/device/lamport.cuh"
#include "kernels/host/launch.cuh"

namespace mnnvl::kernels {
namespace {

template <typename T, int kWorld, Rows kRows>
__global__ void __launch_bounds__(kFusedThreads, kMinBlocks)
    oneshot_lamport_fused(const __grid_constant__ FusedParams p) {
  using Row = FusedRow<T, kWorld, kRows>;
  __shared__ typename Row::Shared shared;
  grid_dependency_wait();
  const DeviceGroup& g = p.group;
  LamportCall call(g, Operation::kFusedAllReduce);

  Row fused(p, shared);
  const int packs = p.packs, rows = p.rows, batch_step = Row::kBatch * fused.pack_step();
  const int64_t slot_bytes = int64_t(rows) * packs * kPackBytes;  // slot r holds rank r's rows, each of whole packs
  const int64_t apart = int64_t(fused.pack_step()) * kPackBytes;
  const auto offset = [&](int row, int i) { return (int64_t(row) * packs + i) * kPackBytes; };

  // What is wanted first is loaded together with this rank's state.
  uint4 first_own[Row::kBatch] = {};
  if (fused.first_row() < rows) fused.load(p.in, fused.first_row(), fused.first_pack(), first_own);
  fused.prepare(fused.first_row() < rows ? fused.first_row() : -1);
  const auto load_own = [&](int row, int i, uint4(&own)[Row::kBatch]) {
    const bool first = row == fused.first_row() && i == fused.first_pack();
    if (!first) fused.load(p.in, row, i, own);
#pragma unroll
    for (int n = 0; n < Row::kBatch; ++n) own[n] = without_negative_zero<T>(first ? first_own[n] : own[n]);
  };
  // A thread that must not take part comes all the same, so that its cluster ends as one.
  const bool aborted = call.aborted();

  // Phase 1, publish.
  for (int row = fused.first_row(); row < rows && !aborted; row += fused.row_step()) {
    for (int i = fused.first_pack(); i < packs; i += batch_step) {
      uint4 own[Row::kBatch];
      load_own(row, i, own);
#pragma unroll
      for (int n = 0; n < Row::kBatch; ++n) {
        if (n != 0 && n >= fused.count_from(i)) continue;
        publish<kWorld>(g, call.stage(0) + g.rank * slot_bytes + offset(row, i) + n * apart, own[n]);
      }
      if constexpr (Row::kOneBatch) break;
    }
    if constexpr (Row::kOneBatch) break;
  }
  call.begin_advance();

  // Phase 2, take, reduce, finish. In place too: a thread reads each pack of the input again before it, and nobody
  // else, writes there.
  const int kept = g.multicast == nullptr ? g.rank : kNoRank;
  for (int row = fused.first_row(); row < rows; row += fused.row_step()) {
    const auto sum = [&](int i, uint4(&packs)[Row::kBatch]) {
#pragma unroll
      for (uint4& pack : packs) pack = {};
      if (aborted) return false;
      uint4 own[Row::kBatch];
      load_own(row, i, own);
      Wait wait(g, Operation::kFusedAllReduce, /*stage=*/0, call.sequence());
      std::byte* first = g.peers[g.rank] + call.stage(0) + offset(row, i);
      const auto slot = [&](int r, int n) { return first + n * apart + r * slot_bytes; };
      return take_and_sum<T, kWorld>(g, slot, kept, own, fused.count_from(i), 1.0f, wait,
                                     uint64_t(offset(row, i) / kPackBytes), packs);
    };
    if (!fused.finish(row, sum) || Row::kOneBatch) break;
  }
  call.end_advance();
  if (p.first_row == 0) fused.zero_padding();
}

// A group of one.
template <typename T, Rows kRows>
__global__ void __launch_bounds__(kFusedThreads, kMinBlocks) fused_alone(const __grid_constant__ FusedParams p) {
  using Row = FusedRow<T, 1, kRows>;
  __shared__ typename Row::Shared shared;
  grid_dependency_wait();
  Row fused(p, shared);
  fused.prepare(fused.first_row() < p.rows ? fused.first_row() : -1);
  for (int row = fused.first_row(); row < p.rows; row += fused.row_step()) {
    const auto sum = [&](int i, uint4(&packs)[Row::kBatch]) {
      fused.load(p.in, row, i, packs);
#pragma unroll
      for (uint4& pack : packs) {
        Accumulator<T> acc;
        acc.begin(pack);
        acc.add({});  // so that NaN and -0 become what they become in any sum
        pack = acc.finish(1.0f);
      }
      return true;
    };
    if (!fused.finish(row, sum) || Row::kOneBatch) break;
  }
  if (p.first_row == 0) fused.zero_padding();
}

Rows rows_of(const FusedParams& params, const Launch& shape) {
  if (!params.packed) return Rows::kAny;
  const bool scaled = writes_scales(params.work.quantization);
  if (fits_teams(params)) return Rows::kTeams;
  const int threads = shape.threads * shape.cluster;  // of a row
  if (params.rows > params.blocks / shape.cluster || params.packs > (scaled ? 1 : 2) * threads) return Rows::kPacked;
  return params.packs > threads ? Rows::kTwoPacks : scaled ? Rows::kOnePack : Rows::kUnscaled;
}

#define MNNVL_FOR_EACH_FUSED(X) MNNVL_FOR_EACH_INSTANCE(X) X(float, 1) X(__half, 1) X(__nv_bfloat16, 1)
template <typename T, int kWorld, Rows kRows>
constexpr auto kernel_of() {
  if constexpr (kWorld == 1) {
    constexpr bool kHasNone = sizeof(T) == 4 && kRows == Rows::kTeams;
    constexpr Rows kKind = kHasNone ? Rows::kPacked : kRows;
    return fused_alone<T, kKind>;
  } else {
    constexpr int kInstance = kRows == Rows::kAny ? 0 : fused_instance<T>(kWorld);
    // Larger worlds send many rows by two shots.
    constexpr bool kHasNone = (kRows >= Rows::kOnePack && !has_one_pack(kInstance)) ||
                              (kRows >= Rows::kTwoPacks && !has_two_packs(kInstance));
    constexpr Rows kKind = kHasNone ? Rows::kPacked : kRows;
    return oneshot_lamport_fused<T, kInstance, kKind>;
  }
}

void launch_instance(const FusedParams& params, const Launch& shape) {
  const auto launch_rows = [&](auto any, auto packed, auto one_pack, auto unscaled, auto two_packs, auto teams) {
    switch (rows_of(params, shape)) {
      case Rows::kAny: return launch(any, params, params.blocks, shape);
      case Rows::kPacked: return launch(packed, params, params.blocks, shape);
      case Rows::kOnePack: return launch(one_pack, params, params.blocks, shape);
      case Rows::kUnscaled: return launch(unscaled, params, params.blocks, shape);
      case Rows::kTwoPacks: return launch(two_packs, params, params.blocks, shape);
      case Rows::kTeams: return launch(teams, params, params.blocks, shape);
    }
  };
#define MNNVL_LAUNCH(T, world) \
  if (params.work.dtype == dtype_of<T>() && instance_of(params.group.world_size) == world) { \
    return launch_rows(kernel_of<T, world, Rows::kAny>(), kernel_of<T, world, Rows::kPacked>(), \
                       kernel_of<T, world, Rows::kOnePack>(), kernel_of<T, world, Rows::kUnscaled>(), \
                       kernel_of<T, world, Rows::kTwoPacks>(), kernel_of<T, world, Rows::kTeams>()); \
  }
  MNNVL_FOR_EACH_FUSED(MNNVL_LAUNCH)
#undef MNNVL_LAUNCH
}

void load_instances() {
#define MNNVL_LOAD(T, world) \
  load(kernel_of<T, world, Rows::kAny>()); \
  load(kernel_of<T, world, Rows::kPacked>()); \
  load(kernel_of<T, world, Rows::kOnePack>()); \
  load(kernel_of<T, world, Rows::kUnscaled>()); \
  load(kernel_of<T, world, Rows::kTwoPacks>()); \
  load(kernel_of<T, world, Rows::kTeams>());
  MNNVL_FOR_EACH_FUSED(MNNVL_LOAD)
#undef MNNVL_LOAD
}

}  // namespace

namespace rows {
extern constexpr KernelTable::Row<FusedParams> oneshot_fused{"oneshot_lamport_fused", launch_instance, load_instances};
}

}  // namespace mnnvl::kernels
