// Which kernel and which launch shape serve an all-reduce: a pure function, tested without a GPU.
#pragma once

#include <cstdint>

#include "protocol/workspace.h"

namespace mnnvl {

enum class Algorithm : int { kOneShotLamport = 0, kTwoShotLamport = 1, kTwoShotEpoch = 2 };

const char* name(Algorithm algorithm);

// All of it is the same on every rank of a group, so that every rank chooses the same.
struct GroupShape {
  int world_size = 1;
  bool multicast = false;
  int compute_capability = 90;  // smallest of the group
  int multiprocessors = 132;    // smallest of the group
  WorkspaceLayout layout{};
};

struct Choice {
  Algorithm algorithm = Algorithm::kOneShotLamport;
  int blocks = 1;             // epoch kernels; the Lamport kernels derive theirs from the size
  int threads = 128;
  int64_t launch_elements = 0;  // most elements of one launch; a larger tensor takes several
};

// `strategy` kOneShot and kTwoShot force the Lamport kernel of that name where the workspace has no epoch slots, and let
// two-shot pick between its Lamport and its epoch kernel where it has.
Choice choose_all_reduce(const GroupShape& group, int64_t numel, Dtype dtype, Strategy strategy);

// Blocks and threads of an epoch gather of `bytes` per contribution.
Choice choose_gather(const GroupShape& group, int64_t bytes);

}  // namespace mnnvl
