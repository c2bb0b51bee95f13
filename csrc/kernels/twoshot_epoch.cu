// All-reduce of any size in one launch: two shots through the slots of the epoch pipe, three tiles in flight a block.
#include "kernels/dispatch.cuh"
#include "kernels/epoch.cuh"

namespace mnnvl::kernels {
namespace {

// A tile is what one block carries in one step: a piece for every owner, the last tile's pieces being smaller.
struct Tile {
  int64_t begin;  // bytes from the tensor's start
  int64_t bytes;
  int64_t piece;  // bytes of each owner's piece but the last ones

  __device__ __forceinline__ Tile(int64_t index, int64_t total_bytes, int64_t piece_bytes, int world) {
    begin = index * piece_bytes * world;
    bytes = min64(piece_bytes * world, total_bytes - begin);
    piece = ceil_div(ceil_div(bytes, kPackBytes), world) * kPackBytes;
  }
  __device__ __forceinline__ int64_t start(int owner) const { return begin + owner * piece; }
  __device__ __forceinline__ int64_t size(int owner) const { return max64(0, min64(piece, bytes - owner * piece)); }
};

template <typename T, int kWorld>
__device__ __forceinline__ void reduce_and_publish(const AllReduceParams& p, const EpochPipe& pipe, const Tile& tile,
                                                   uint32_t epoch) {
  const DeviceGroup& g = p.group;
  const int world = kWorld ? kWorld : g.world_size;
  const float divisor = p.op == ReduceOp::kAvg ? float(world) : 1.0f;
  const int64_t begin = tile.start(g.rank), bytes = tile.size(g.rank);
  const std::byte* in = static_cast<const std::byte*>(p.in) + begin;
  std::byte* out = static_cast<std::byte*>(p.out) + begin;
  const std::byte* first = pipe.slot(g.rank, 0, epoch, 0);
  const int64_t stride = pipe.slot(g.rank, 0, epoch, 1) - first;
  std::byte* result = pipe.slot(g.rank, 1, epoch, g.rank);
  for (int64_t at = int64_t(threadIdx.x) * kPackBytes; at < bytes; at += int64_t(blockDim.x) * kPackBytes) {
    const uint4 own = without_negative_zero<T>(load_pack<Unit<T>>(in + at, bytes - at));
    Accumulator<T> acc;
    if constexpr (kWorld != 0) {
      uint4 packs[kWorld];
#pragma unroll
      for (int r = 0; r < kWorld; ++r) packs[r] = r == g.rank ? own : ld_relaxed_sys_v4(first + r * stride + at);
      acc.begin(packs[0]);
#pragma unroll
      for (int r = 1; r < kWorld; ++r) acc.add(packs[r]);
    } else {
      acc.begin(g.rank == 0 ? own : ld_relaxed_sys_v4(first + at));
      for (int r = 1; r < world; ++r) acc.add(r == g.rank ? own : ld_relaxed_sys_v4(first + r * stride + at));
    }
    const uint4 sum = acc.finish(divisor);
#pragma unroll
    for (int i = 1; i < world; ++i) {
      const int peer = g.rank + i < world ? g.rank + i : g.rank + i - world;
      *reinterpret_cast<uint4*>(g.peers[peer] + (result - g.peers[g.rank]) + at) = sum;
    }
    store_pack<Unit<T>>(out + at, bytes - at, sum);
  }
}

// Stores of -0 removal are left to the owner: the pipe assumes nothing of the bits it carries.
template <typename T, int kWorld>
__global__ void __launch_bounds__(kMaxThreads) twoshot_epoch_allreduce(const __grid_constant__ AllReduceParams p) {
  grid_dependency_wait();
  const DeviceGroup& g = p.group;
  const int world = kWorld ? kWorld : g.world_size;
  EpochPipe pipe(g, Operation::kAllReduce);
  if (pipe.aborted()) return;
  const std::byte* in = static_cast<const std::byte*>(p.in);
  std::byte* out = static_cast<std::byte*>(p.out);
  const int64_t bytes = p.numel * int64_t(sizeof(T));
  const int64_t piece = g.layout.pipe_piece_bytes(world);
  const int64_t tiles = ceil_div(bytes, piece * world);
  const int64_t steps = tiles > blockIdx.x ? ceil_div(tiles - blockIdx.x, gridDim.x) : 0;
  const auto tile_of = [&](int64_t step) { return Tile(blockIdx.x + step * gridDim.x, bytes, piece, world); };
  const uint32_t base = pipe.last_epoch() + 1;

  for (int64_t i = 0; i < steps + 2; ++i) {
    const uint32_t epoch = base + uint32_t(i);
    // Phase 1: tile i's pieces to their owners.
    if (i < steps) {
      const Tile tile = tile_of(i);
      for (int k = 1; k < world; ++k) {
        const int owner = g.rank + k < world ? g.rank + k : g.rank + k - world;
        copy_piece<Unit<T>>(pipe.slot(owner, 0, epoch, g.rank), in + tile.start(owner), tile.size(owner));
      }
      pipe.post(/*stage=*/0, epoch);
    }
    // Phase 2: the own piece of tile i-1, reduced and stored to everyone.
    if (i >= 1 && i - 1 < steps) {
      if (!pipe.await(/*stage=*/0, epoch - 1)) return;
      reduce_and_publish<T, kWorld>(p, pipe, tile_of(i - 1), epoch - 1);
      pipe.post(/*stage=*/1, epoch - 1);
    }
    // Phase 3: the others' pieces of tile i-2.
    if (i >= 2) {
      if (!pipe.await(/*stage=*/1, epoch - 2)) return;
      const Tile tile = tile_of(i - 2);
      for (int k = 1; k < world; ++k) {
        const int owner = g.rank + k < world ? g.rank + k : g.rank + k - world;
        copy_piece<Unit<T>>(out + tile.start(owner), pipe.slot(g.rank, 1, epoch - 2, owner), tile.size(owner));
      }
    }
  }
  pipe.finish(base + uint32_t(steps) - 1);
}

}  // namespace

void launch_twoshot_epoch_allreduce(const AllReduceParams& params, const Launch& shape) {
#define MNNVL_LAUNCH(T, world)                                                        \
  if (params.dtype == dtype_of<T>() && instance_of(params.group.world_size) == world) \
    return launch(twoshot_epoch_allreduce<T, world>, params, shape);
  MNNVL_FOR_EACH_INSTANCE(MNNVL_LAUNCH)
#undef MNNVL_LAUNCH
}

void load_twoshot_epoch() {
#define MNNVL_LOAD(T, world) load(twoshot_epoch_allreduce<T, world>);
  MNNVL_FOR_EACH_INSTANCE(MNNVL_LOAD)
#undef MNNVL_LOAD
}

}  // namespace mnnvl::kernels
