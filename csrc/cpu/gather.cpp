#include "cpu/arguments.h"
#include "cpu/operations.h"

namespace mnnvl::cpu {

// All post, and the root alone reads. It shows nothing, but names its call: two ranks that both think to be the root
// find out.
void run(Steps& steps, const GatherRequest& request, int64_t timeout_ms) {
  const bool is_root = steps.rank() == request.root;
  check_root(operation_of(request), request.root, steps.world_size());
  check_bytes(operation_of(request), request.bytes);
  steps.begin(descriptor_of(request), timeout_ms);
  const auto* in = static_cast<const std::byte*>(request.in);
  if (steps.world_size() > 1) {
    const Chunks chunks = steps.chunks(request.bytes);
    const auto fill = [&](int64_t i, uint32_t epoch) {
      if (!is_root) copy_bytes(steps.slot(steps.rank(), epoch), in + chunks.begin(i), chunks.bytes(i));
    };
    const auto take = [&](int64_t i, uint32_t epoch) {
      for (int d = 1; is_root && d < steps.world_size(); ++d) {
        const int peer = steps.peer(d);
        steps.wait_posted(peer, epoch);
        copy_bytes(static_cast<std::byte*>(request.outs[peer]) + chunks.begin(i), steps.slot(peer, epoch),
                   chunks.bytes(i));
      }
    };
    steps.run(chunks.count, /*posts=*/true, fill, take);
  }
  if (is_root && request.bytes > 0 && request.outs[request.root] != in) {
    copy_bytes(request.outs[request.root], in, request.bytes);
  }
}

}  // namespace mnnvl::cpu
