// Which kernel and which launch shape serve a collective: pure functions, tested without a GPU.
#pragma once

#include <cstdint>

#include "protocol/workspace.h"

namespace mnnvl {

enum class Algorithm : int { kOneShotLamport = 0, kTwoShotLamport = 1 };

const char* name(Algorithm algorithm);

// The same on every rank of a group, so that every rank chooses the same; but max_blocks may differ from call to call
// and from rank to rank, where fused rows don't go by it.
struct GroupShape {
  int world_size = 1;
  int multiprocessors = 132;  // smallest of the group
  int max_blocks = 0;  // most blocks of a launch, for fewer multiprocessors than there are; 0: one on each
  WorkspaceLayout layout{};
  bool multicast = false;
  int64_t oneshot_bytes = -1;  // AUTO takes one shot up to so many bytes of the tensor; -1: what the table says
};

struct LamportShape {
  int blocks = 1;
  int threads = 128;
  int64_t launch_elements = 0;  // most elements of one launch; a larger tensor takes several
};

// A launch in windows, and how many packs of each slice or part are in one.
struct WindowShape : LamportShape {
  int windows = 1;
  uint32_t window_packs = 0;
};

struct AllReduceChoice : WindowShape {  // a one-shot has one window
  Algorithm algorithm = Algorithm::kOneShotLamport;
};
AllReduceChoice choose_all_reduce(const GroupShape& group, int64_t numel, Dtype dtype, Strategy strategy);

// A reduce-scatter of float sums, `numel` elements to each rank.
WindowShape choose_reduce_scatter(const GroupShape& group, int64_t numel, Dtype dtype);

// A fused all-reduce: rows, each padded to `row_packs` whole packs. A cluster of blocks takes a row. launch_rows: most
// of one launch.
struct FusedShape {
  int cluster = 1;
  int threads = kFusedThreads;
  int team = 0;  // threads of a block that take a row, where the kernel has teams; 0: all do
};
struct FusedChoice : FusedShape {
  Algorithm algorithm = Algorithm::kOneShotLamport;
  int blocks = 1;  // a multiple of it
  int64_t launch_rows = 0;
};
// For `rows` that are begun at once: as many blocks a cluster as there is work and room for.
FusedShape choose_fused_shape(int64_t rows, int64_t row_packs, int multiprocessors);
FusedChoice choose_fused(const GroupShape& group, int64_t rows, int64_t row_packs, Strategy strategy);

// How many blocks serve the sends, or the receives, of an exchange: `channels` of them, whose largest message takes
// `lanes`. A block serves kMaxBlockLanes at most. Point-to-point kernels may all wait at once, one for each peer and
// direction: together they get a block on three quarters of the multiprocessors, beside a collective's.
constexpr int kMaxExchangeBlocks = 32;
constexpr int kMaxBlockLanes = 32;
int choose_exchange_blocks(const GroupShape& group, ChannelKind kind, int channels, int lanes);

// Blocks for a copy of this rank's own contribution, beside what moves.
int choose_copy_blocks(const GroupShape& group, int64_t bytes);

}  // namespace mnnvl
