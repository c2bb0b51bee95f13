#include "common/error.h"
#include "cpu/operations.h"

namespace mnnvl::cpu {

void run(Steps& steps, const AllGatherRequest& request, int64_t timeout_ms) {
  const int64_t bytes = request.bytes;
  if (bytes < 0) fail(ErrorKind::kInvalidArgument, "mnnvl: all_gather of ", bytes, " bytes");
  steps.begin(descriptor_of(request, steps.world_size()), timeout_ms);
  if (bytes == 0) return;
  const int rank = steps.rank();
  const auto* in = static_cast<const std::byte*>(request.in);
  if (steps.world_size() > 1) {
    const Chunks chunks = steps.chunks(bytes);
    const uint32_t first = steps.take_epochs(chunks.count);
    const auto post = [&](int64_t i) {
      const uint32_t epoch = first + static_cast<uint32_t>(i);
      steps.wait_for_slot(epoch);
      copy_bytes(steps.slot(rank, epoch), in + chunks.begin(i), chunks.bytes(i));
      steps.post(epoch);
    };
    post(0);
    for (int64_t i = 0; i < chunks.count; ++i) {
      if (i + kPostAhead < chunks.count) post(i + kPostAhead);
      const uint32_t epoch = first + static_cast<uint32_t>(i);
      for (int d = 1; d < steps.world_size(); ++d) {
        const int peer = steps.peer(d);
        steps.wait_posted(peer, epoch);
        copy_bytes(static_cast<std::byte*>(request.outs[peer]) + chunks.begin(i), steps.slot(peer, epoch),
                   chunks.bytes(i));
      }
      steps.finish(epoch);
    }
  }
  if (request.outs[rank] != in) copy_bytes(request.outs[rank], in, bytes);
}

}  // namespace mnnvl::cpu
