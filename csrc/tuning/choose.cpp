#include "tuning/choose.h"

#include <algorithm>

#include "common/math.h"
#include "tuning/crossover.h"

namespace mnnvl {
namespace {

constexpr Crossover kCrossovers[] = {
#include "tuning/tables/gpu_crossovers.inc"
};
static_assert(complete(kCrossovers));

int64_t oneshot_limit(const GroupShape& group) {
  return oneshot_limit(kCrossovers, group.world_size, group.oneshot_bytes);
}

int most_blocks(const GroupShape& group) {
  return group.max_blocks > 0 ? std::min(group.max_blocks, group.multiprocessors) : group.multiprocessors;
}

// One thread a pack. Few packs go to as few threads a block as still give every multiprocessor work (the more blocks,
// the sooner the first packs leave); of a two-shot's middle sizes full blocks on half the multiprocessors are faster.
// From one full block a multiprocessor on, threads take several packs.
void shape_lamport(LamportShape& choice, bool stores_once, int64_t packs, const GroupShape& group) {
  const int blocks = most_blocks(group), most = max_all_reduce_threads(group.world_size);
  const bool middle = stores_once && packs <= int64_t{256} * blocks;
  choice.threads = packs <= int64_t{128} * blocks ? 128 : middle ? 256 : most;
  choice.blocks = int(std::clamp<int64_t>(ceil_div(packs, choice.threads), 1, blocks));
}

// Few blocks take their multiprocessors whole: as many as messages leave to them (csrc/README.md, "Progress").
int most_whole_blocks(const GroupShape& group) { return group.multiprocessors / 4; }

void shape_windows(WindowShape& choice, bool stores_once, const GroupShape& group) {
  shape_lamport(choice, stores_once, choice.window_packs, group);
  const int most = max_all_reduce_threads(group.world_size);
  if (choice.threads < most || most_blocks(group) > most_whole_blocks(group)) return;
  if (2 * (group.world_size - 1) > group.multiprocessors - most_whole_blocks(group)) return;
  choice.threads = 2 * most;
  choice.blocks = int(std::min<int64_t>(choice.blocks, ceil_div(choice.window_packs, choice.threads)));
}

// Kernels count packs in 32 bits.
constexpr int64_t kMostPacks = int64_t{1} << 30;

// Equal windows, of whole lines of the caches, of `packs` of which a generation has room for `room`. A workspace so
// small that ranks could be without packs in more than the last two (csrc/README.md) takes a generation a launch.
void cut_into_windows(WindowShape& shape, int64_t packs, int64_t room, const GroupShape& group) {
  constexpr int64_t kLinePacks = 128 / kPackBytes;
  const int64_t most = align_down(room / kGenerationWindows, kLinePacks);
  shape.window_packs = uint32_t(std::clamp<int64_t>(packs, 1, room));
  if (packs > room && most >= 2 * group.world_size) {
    const int64_t window = align_up(ceil_div(packs, ceil_div(packs, most)), kLinePacks);
    shape.windows = int(ceil_div(packs, window));
    shape.window_packs = uint32_t(window);
  }
}

// Of one role: a launch has blocks that send, that receive, and that copy.
int most_exchange_blocks(const GroupShape& group) { return std::clamp(most_blocks(group) / 3, 1, kMaxExchangeBlocks); }

}  // namespace

const char* name(Algorithm algorithm) {
  return algorithm == Algorithm::kOneShotLamport ? "oneshot_lamport" : "twoshot_lamport";
}

AllReduceChoice choose_all_reduce(const GroupShape& group, int64_t numel, Dtype dtype, Strategy strategy) {
  const int world = group.world_size, element = element_size(dtype);
  const int64_t bytes = numel * element, packs = ceil_div(bytes, kPackBytes);
  const int64_t oneshot_elements = group.layout.oneshot_capacity(world, element);
  const bool oneshot = strategy == Strategy::kOneShot ||
                       (strategy == Strategy::kAuto && bytes <= oneshot_limit(group) && numel <= oneshot_elements);
  AllReduceChoice choice;
  if (oneshot) {
    choice.algorithm = Algorithm::kOneShotLamport;
    choice.launch_elements = oneshot_elements;
    shape_lamport(choice, true, std::min(packs, ceil_div(oneshot_elements * element, kPackBytes)), group);
  } else {
    choice.algorithm = Algorithm::kTwoShotLamport;
    cut_into_windows(choice, slice_packs(min64(packs, kMostPacks), world),
                     group.layout.twoshot_slice(world, group.multicast), group);
    shape_windows(choice, /*stores_once=*/false, group);
    choice.launch_elements = int64_t{choice.window_packs} * choice.windows * world * kPackBytes / element;
  }
  return choice;
}

WindowShape choose_reduce_scatter(const GroupShape& group, int64_t numel, Dtype dtype) {
  const int element = element_size(dtype);
  WindowShape shape;
  cut_into_windows(shape, min64(ceil_div(numel * element, kPackBytes), kMostPacks),
                   group.layout.generation_bytes / kPackBytes / (group.world_size - 1), group);
  shape_windows(shape, /*stores_once=*/true, group);
  shape.launch_elements = int64_t{shape.window_packs} * shape.windows * kPackBytes / element;
  return shape;
}

// A warp for each scheduler of a multiprocessor is fastest, as long as there are multiprocessors; of more rows the
// loads of several must be under way in one (docs/notes.md).
FusedShape choose_fused_shape(int64_t rows, int64_t row_packs, int multiprocessors) {
  constexpr int kFew = kFusedThreads / 2;
  FusedShape shape;
  while (shape.cluster < kMaxFusedCluster && shape.cluster * kFew < row_packs) {
    if (2 * shape.cluster * rows > multiprocessors) break;
    shape.cluster *= 2;
  }
  shape.threads = row_packs <= shape.cluster * kFew ? kFew : kFusedThreads;
  if (rows > multiprocessors) shape.team = kFusedThreads / (rows > 2 * multiprocessors ? kMaxFusedTeams : 2);
  if (shape.team >= shape.threads) shape.team = 0;
  return shape;
}

FusedChoice choose_fused(const GroupShape& group, int64_t rows, int64_t row_packs, Strategy strategy) {
  const int world = group.world_size;
  const int64_t row_bytes = row_packs * kPackBytes;
  const int64_t oneshot_rows = group.layout.generation_bytes / (world * row_bytes);
  const int64_t twoshot_rows = group.layout.generation_bytes / 2 / (world * row_bytes) * world;
  const bool oneshot = strategy == Strategy::kOneShot ||
                       (strategy == Strategy::kAuto &&
                        ((rows * row_bytes <= oneshot_limit(group) && rows <= oneshot_rows) || twoshot_rows == 0));
  FusedChoice choice;
  choice.algorithm = oneshot ? Algorithm::kOneShotLamport : Algorithm::kTwoShotLamport;
  choice.launch_rows = oneshot ? oneshot_rows : twoshot_rows;
  int64_t at_once = min64(rows, choice.launch_rows);
  if (!oneshot) at_once = ceil_div(at_once, world);
  static_cast<FusedShape&>(choice) = choose_fused_shape(at_once, row_packs, most_blocks(group));
  choice.blocks = int(std::clamp<int64_t>(at_once, 1, most_blocks(group) / choice.cluster)) * choice.cluster;
  return choice;
}

// As few lanes a block as the blocks allow: one that is alone in its block is waited for by the data warps.
int choose_exchange_blocks(const GroupShape& group, ChannelKind kind, int channels, int lanes) {
  if (channels == 0) return 0;
  const int all = channels * lanes, least = int(ceil_div(all, kMaxBlockLanes));
  int most = most_exchange_blocks(group);
  if (kind == ChannelKind::kPointToPoint) {
    const int room = std::min(most_blocks(group), group.multiprocessors - most_whole_blocks(group));
    const int share = room / (2 * (group.world_size - 1));  // of one peer and direction
    most = channels * std::clamp(share, 1, most);
  }
  return std::max(least, std::min(all, most));
}

int choose_copy_blocks(const GroupShape& group, int64_t bytes) {
  constexpr int64_t kBytesABlock = 32 << 10;
  return int(min64(most_exchange_blocks(group), ceil_div(bytes, kBytesABlock)));
}

}  // namespace mnnvl
