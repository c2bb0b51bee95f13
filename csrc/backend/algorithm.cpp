#include "backend/algorithm.h"

#include <algorithm>

#include "common/error.h"

namespace mnnvl {
namespace {

// Up to these sizes (bytes of the tensor) one shot is faster than two. One shot sends world_size - 1 copies, two shots
// about two, after one more hop.
struct Crossover {
  int world_size;  // applies up to this world size
  int64_t oneshot_bytes;
  int64_t lamport_bytes;  // up to here a Lamport two-shot beats the epoch kernel
};
constexpr Crossover kCrossovers[] = {
    {2, 4 << 20, 4 << 20},
    {4, 512 << 10, 4 << 20},
    {8, 256 << 10, 4 << 20},
    {kMaxWorldSize, 64 << 10, 2 << 20},
};

const Crossover& crossover(int world_size) {
  for (const Crossover& c : kCrossovers) {
    if (world_size <= c.world_size) return c;
  }
  fail(ErrorKind::kInvalidArgument, "world size ", world_size, " is over ", kMaxWorldSize);
}

// Enough blocks to use many multiprocessors before any of them gets more threads.
int lamport_threads(int64_t packs, int multiprocessors) {
  for (int threads : {128, 256}) {
    if (packs <= int64_t{threads} * multiprocessors) return threads;
  }
  return 512;
}

}  // namespace

const char* name(Algorithm algorithm) {
  switch (algorithm) {
    case Algorithm::kOneShotLamport: return "oneshot_lamport";
    case Algorithm::kTwoShotLamport: return "twoshot_lamport";
    case Algorithm::kTwoShotEpoch: return "twoshot_epoch";
  }
  return "?";
}

Choice choose_all_reduce(const GroupShape& group, int64_t numel, Dtype dtype, Strategy strategy) {
  const int world = group.world_size;
  const int element = element_size(dtype);
  const int64_t bytes = numel * element;
  const WorkspaceLayout& layout = group.layout;
  const Crossover& limits = crossover(world);
  const bool has_epochs = layout.pipe_piece_bytes(world) > 0;

  bool oneshot = strategy == Strategy::kOneShot;
  if (strategy == Strategy::kAuto) {
    oneshot = bytes <= limits.oneshot_bytes && numel <= layout.oneshot_capacity(world, element);
  }
  Choice choice;
  const int64_t packs = ceil_div(bytes, kPackBytes);
  if (oneshot) {
    choice.algorithm = Algorithm::kOneShotLamport;
    choice.launch_elements = layout.oneshot_capacity(world, element);
    choice.threads = lamport_threads(packs, group.multiprocessors);
    return choice;
  }
  const int64_t capacity = layout.twoshot_capacity(world, element);
  if (!has_epochs || (bytes <= limits.lamport_bytes && numel <= capacity)) {
    choice.algorithm = Algorithm::kTwoShotLamport;
    choice.launch_elements = capacity;
    choice.threads = lamport_threads(slice_packs(packs, world), group.multiprocessors);
    return choice;
  }
  choice.algorithm = Algorithm::kTwoShotEpoch;
  choice.launch_elements = numel;
  choice.threads = 512;
  const int64_t tiles = ceil_div(bytes, layout.pipe_piece_bytes(world) * world);
  choice.blocks = int(std::clamp<int64_t>(tiles, 1, std::min(kPipeBlocks, group.multiprocessors)));
  return choice;
}

Choice choose_gather(const GroupShape& group, int64_t bytes) {
  Choice choice;
  choice.threads = bytes <= 4096 ? 128 : 512;
  const int64_t pieces = ceil_div(bytes, group.layout.pipe_piece_bytes(group.world_size));
  choice.blocks = int(std::clamp<int64_t>(pieces, 1, std::min(kPipeBlocks, group.multiprocessors)));
  return choice;
}

}  // namespace mnnvl
