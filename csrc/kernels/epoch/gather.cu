// all_gather, broadcast and barrier of bytes, through the epoch pipe.
#include "kernels/device/epoch.cuh"
#include "kernels/host/launch.cuh"

namespace mnnvl::kernels {
namespace {

template <typename Unit>
__global__ void __launch_bounds__(kMaxGatherThreads, kMinBlocks) epoch_gather(const __grid_constant__ GatherParams p) {
  grid_dependency_wait();
  const DeviceGroup& g = p.group;
  EpochPipe pipe(g, p.operation);
  if (pipe.aborted()) return;
  const int world = g.world_size;
  const bool contributes = p.source < 0 || p.source == g.rank;
  const int64_t piece = g.layout.pipe_piece_bytes(world);
  const int64_t pieces = max64(1, ceil_div(p.bytes, piece));  // without data still one step: a barrier
  const int64_t steps = pieces > blockIdx.x ? ceil_div(pieces - blockIdx.x, gridDim.x) : 0;
  const auto begin_of = [&](int64_t step) { return (blockIdx.x + step * gridDim.x) * piece; };
  const uint32_t base = pipe.last_epoch() + 1;
  const std::byte* in = static_cast<const std::byte*>(p.in);

  for (int64_t i = 0; i < steps + 1; ++i) {
    const uint32_t epoch = base + uint32_t(i);
    // Phase 1: piece i to every peer, and to the own output.
    if (i < steps) {
      const int64_t begin = begin_of(i), bytes = min64(piece, p.bytes - begin);
      if (contributes) {
        for (int k = 1; k < world; ++k) {
          const int peer = g.rank + k < world ? g.rank + k : g.rank + k - world;
          copy_piece<Unit>(pipe.slot(peer, epoch, g.rank), in + begin, bytes);
        }
        std::byte* own = static_cast<std::byte*>(p.outs[g.rank]);
        if (own != nullptr && own != in) copy_piece<Unit>(own + begin, in + begin, bytes);
      }
      pipe.post(epoch);
    }
    // Phase 2: the peers' piece i-1.
    if (i >= 1) {
      if (!pipe.await(epoch - 1)) return;
      const int64_t begin = begin_of(i - 1), bytes = min64(piece, p.bytes - begin);
      for (int k = 1; k < world; ++k) {
        const int source = g.rank + k < world ? g.rank + k : g.rank + k - world;
        std::byte* out = static_cast<std::byte*>(p.outs[source]);
        if (out == nullptr || (p.source >= 0 && p.source != source)) continue;
        copy_piece<Unit>(out + begin, pipe.slot(g.rank, epoch - 1, source), bytes);
      }
    }
  }
  pipe.finish(base + uint32_t(steps) - 1);
}

void launch_instance(const GatherParams& params, const Launch& shape) {
  uintptr_t alignment = reinterpret_cast<uintptr_t>(params.in) | static_cast<uintptr_t>(params.bytes);
  for (int r = 0; r < params.group.world_size; ++r) alignment |= reinterpret_cast<uintptr_t>(params.outs[r]);
  if (alignment % 4 == 0) return launch(epoch_gather<uint32_t>, params, params.blocks, shape);
  launch(epoch_gather<uint8_t>, params, params.blocks, shape);
}

void load_instances() {
  load(epoch_gather<uint32_t>);
  load(epoch_gather<uint8_t>);
}

}  // namespace

namespace rows {
extern constexpr KernelTable::Row<GatherParams> epoch_gather{"epoch_gather", launch_instance, load_instances};
}

}  // namespace mnnvl::kernels
