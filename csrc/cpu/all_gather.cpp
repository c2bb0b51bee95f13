#include "cpu/arguments.h"
#include "cpu/operations.h"

namespace mnnvl::cpu {

// One slot, read by all: a rank's bytes are written once, where channels to every peer would write them world size - 1
// times. Contributions that differ in size take the steps of the largest; a rank that has no more still posts, so that
// its call is looked at.
void run(Steps& steps, const AllGatherRequest& request, int64_t timeout_ms) {
  const int rank = steps.rank();
  int64_t largest = 0;
  for (int r = 0; r < steps.world_size(); ++r) {
    check_bytes(operation_of(request), request.bytes_of(r));
    largest = max64(largest, request.bytes_of(r));
  }
  steps.begin(descriptor_of(request, steps.world_size()), timeout_ms);
  if (largest == 0) return;
  const auto* in = static_cast<const std::byte*>(request.in);
  if (steps.world_size() > 1) {
    const Chunks chunks = steps.chunks(largest);
    const auto part = [&](int r, int64_t i) { return min64(chunks.bytes(i), request.bytes_of(r) - chunks.begin(i)); };
    const auto fill = [&](int64_t i, uint32_t epoch) {
      if (part(rank, i) > 0) copy_bytes(steps.slot(rank, epoch), in + chunks.begin(i), part(rank, i));
    };
    const auto take = [&](int64_t i, uint32_t epoch) {
      for (int d = 1; d < steps.world_size(); ++d) {
        const int peer = steps.peer(d);
        steps.wait_posted(peer, epoch);
        if (part(peer, i) <= 0) continue;
        copy_bytes(static_cast<std::byte*>(request.outs[peer]) + chunks.begin(i), steps.slot(peer, epoch),
                   part(peer, i));
      }
    };
    steps.run(chunks.count, /*posts=*/true, fill, take);
  }
  if (request.outs[rank] != in) copy_bytes(request.outs[rank], in, request.bytes_of(rank));
}

}  // namespace mnnvl::cpu
