// The checks that operations have in common: Error(kInvalidArgument), before anything is shared with a peer.
#pragma once

#include <cstdint>

#include "common/error.h"
#include "protocol/types.h"

namespace mnnvl::cpu {

inline void check_bytes(Operation operation, int64_t bytes) {
  if (bytes < 0) fail(ErrorKind::kInvalidArgument, "mnnvl: ", name(operation), " of ", bytes, " bytes");
}

inline void check_numel(Operation operation, int64_t numel) {
  if (numel < 0) fail(ErrorKind::kInvalidArgument, "mnnvl: ", name(operation), " of ", numel, " elements");
}

inline void check_root(Operation operation, int root, int world_size) {
  if (root >= 0 && root < world_size) return;
  fail(ErrorKind::kInvalidArgument, "mnnvl: ", name(operation), " with root ", root, " in a group of ", world_size);
}

}  // namespace mnnvl::cpu
