#include "cpu/arguments.h"
#include "cpu/operations.h"

namespace mnnvl::cpu {

// The root alone posts, and runs ahead of its readers as far as the slots reach. All read one slot: a channel to each
// (channel.h) would have it write the bytes world size - 1 times.
void run(Steps& steps, const BroadcastRequest& request, int64_t timeout_ms) {
  const int root = request.root;
  check_root(operation_of(request), root, steps.world_size());
  check_bytes(operation_of(request), request.bytes);
  steps.begin(descriptor_of(request), timeout_ms);
  if (steps.world_size() == 1) return;
  auto* data = static_cast<std::byte*>(request.data);
  const Chunks chunks = steps.chunks(request.bytes);
  const auto fill = [&](int64_t i, uint32_t epoch) {
    copy_bytes(steps.slot(root, epoch), data + chunks.begin(i), chunks.bytes(i));
  };
  const auto take = [&](int64_t i, uint32_t epoch) {
    if (steps.rank() == root) return;
    steps.wait_posted(root, epoch);
    copy_bytes(data + chunks.begin(i), steps.slot(root, epoch), chunks.bytes(i));
  };
  steps.run(chunks.count, /*posts=*/steps.rank() == root, fill, take);
}

}  // namespace mnnvl::cpu
