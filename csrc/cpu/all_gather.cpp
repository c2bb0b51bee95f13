#include "common/error.h"
#include "cpu/operations.h"

namespace mnnvl::cpu {

// One slot, read by all: a rank's bytes are written once, where channels to every peer would write them world size - 1
// times. Contributions that differ in size take the steps of the largest; a rank that has no more still posts, so that
// its call is looked at.
void run(Steps& steps, const AllGatherRequest& request, int64_t timeout_ms) {
  const int rank = steps.rank();
  int64_t largest = 0;
  for (int r = 0; r < steps.world_size(); ++r) {
    if (request.bytes_of(r) < 0) {
      fail(ErrorKind::kInvalidArgument, "mnnvl: all_gather of ", request.bytes_of(r), " bytes");
    }
    largest = max64(largest, request.bytes_of(r));
  }
  steps.begin(descriptor_of(request, steps.world_size()), timeout_ms);
  if (largest == 0) return;
  const auto* in = static_cast<const std::byte*>(request.in);
  if (steps.world_size() > 1) {
    const Chunks chunks = steps.chunks(largest);
    const uint32_t first = steps.take_epochs(chunks.count);
    const auto part = [&](int r, int64_t i) { return min64(chunks.bytes(i), request.bytes_of(r) - chunks.begin(i)); };
    const auto post = [&](int64_t i) {
      const uint32_t epoch = first + static_cast<uint32_t>(i);
      steps.wait_for_slot(epoch);
      if (part(rank, i) > 0) copy_bytes(steps.slot(rank, epoch), in + chunks.begin(i), part(rank, i));
      steps.post(epoch);
    };
    post(0);
    for (int64_t i = 0; i < chunks.count; ++i) {
      if (i + kPostAhead < chunks.count) post(i + kPostAhead);
      const uint32_t epoch = first + static_cast<uint32_t>(i);
      for (int d = 1; d < steps.world_size(); ++d) {
        const int peer = steps.peer(d);
        steps.wait_posted(peer, epoch);
        if (part(peer, i) <= 0) continue;
        copy_bytes(static_cast<std::byte*>(request.outs[peer]) + chunks.begin(i), steps.slot(peer, epoch),
                   part(peer, i));
      }
      steps.finish(epoch);
    }
  }
  if (request.outs[rank] != in) copy_bytes(request.outs[rank], in, request.bytes_of(rank));
}

}  // namespace mnnvl::cpu
