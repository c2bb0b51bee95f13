#include "common/error.h"
#include "cpu/operations.h"

namespace mnnvl::cpu {

// The root alone posts, and runs ahead of its readers as far as the slots reach. All read one slot: a channel to each
// (channel.h) would have it write the bytes world size - 1 times.
void run(Steps& steps, const BroadcastRequest& request, int64_t timeout_ms) {
  const int64_t bytes = request.bytes;
  const int root = request.root;
  if (root < 0 || root >= steps.world_size()) {
    fail(ErrorKind::kInvalidArgument, "mnnvl: broadcast from rank ", root, " in a group of ", steps.world_size());
  }
  if (bytes < 0) fail(ErrorKind::kInvalidArgument, "mnnvl: broadcast of ", bytes, " bytes");
  steps.begin(descriptor_of(request), timeout_ms);
  if (bytes == 0 || steps.world_size() == 1) return;
  auto* data = static_cast<std::byte*>(request.data);
  const Chunks chunks = steps.chunks(bytes);
  const uint32_t first = steps.take_epochs(chunks.count);
  for (int64_t i = 0; i < chunks.count; ++i) {
    const uint32_t epoch = first + static_cast<uint32_t>(i);
    if (steps.rank() == root) {
      steps.wait_for_slot(epoch);
      copy_bytes(steps.slot(root, epoch), data + chunks.begin(i), chunks.bytes(i));
      steps.post(epoch);
    } else {
      steps.wait_posted(root, epoch);
      copy_bytes(data + chunks.begin(i), steps.slot(root, epoch), chunks.bytes(i));
    }
    steps.finish(epoch);
  }
}

}  // namespace mnnvl::cpu
