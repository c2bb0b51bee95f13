#include "cpu/arguments.h"
#include "cpu/operations.h"

namespace mnnvl::cpu {

// A broadcast of which every reader has a part of the slot.
void run(Steps& steps, const ScatterRequest& request, int64_t timeout_ms) {
  const int root = request.root;
  check_root(operation_of(request), root, steps.world_size());
  check_bytes(operation_of(request), request.bytes);
  steps.begin(descriptor_of(request), timeout_ms);
  if (request.bytes == 0) return;
  auto* out = static_cast<std::byte*>(request.out);
  const auto in = [&](int r) { return static_cast<const std::byte*>(request.ins[r]); };
  if (steps.world_size() > 1) {
    const Chunks chunks = steps.parted_chunks(request.bytes);
    const auto fill = [&](int64_t i, uint32_t epoch) {
      for (int d = 1; d < steps.world_size(); ++d) {
        const int peer = steps.peer(d);
        copy_bytes(steps.part(root, peer, epoch, chunks.chunk_bytes), in(peer) + chunks.begin(i), chunks.bytes(i));
      }
    };
    const auto take = [&](int64_t i, uint32_t epoch) {
      if (steps.rank() == root) return;
      steps.wait_posted(root, epoch);
      copy_bytes(out + chunks.begin(i), steps.part(root, steps.rank(), epoch, chunks.chunk_bytes), chunks.bytes(i));
    };
    steps.run(chunks.count, /*posts=*/steps.rank() == root, fill, take);
  }
  if (steps.rank() == root && out != in(root)) copy_bytes(out, in(root), request.bytes);
}

}  // namespace mnnvl::cpu
