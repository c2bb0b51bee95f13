#include "cpu/arguments.h"
#include "cpu/operations.h"
#include "cpu/reduction.h"

namespace mnnvl::cpu {

// As gather, with the reduction in place of the copies. The root alone reads, each byte once: ranks that shared the
// work would move more bytes, and could win only where there are many, each with a core of its own.
void run(Steps& steps, const ReduceRequest& request, int64_t timeout_ms) {
  const bool is_root = steps.rank() == request.root;
  check_root(operation_of(request), request.root, steps.world_size());
  check_numel(operation_of(request), request.numel);
  const Reduction reduce(steps, reduce_function(request.dtype, request.op), request.dtype);
  const CallDescriptor descriptor = descriptor_of(request);
  steps.begin(descriptor, timeout_ms);
  const auto* in = static_cast<const std::byte*>(request.in);
  auto* out = static_cast<std::byte*>(request.out);
  if (steps.world_size() == 1) {
    if (out != in) copy_bytes(out, in, descriptor.bytes);
    return;
  }
  const Chunks chunks = steps.chunks(descriptor.bytes);
  const auto fill = [&](int64_t i, uint32_t epoch) {
    if (!is_root) copy_bytes(steps.slot(steps.rank(), epoch), in + chunks.begin(i), chunks.bytes(i));
  };
  const auto take = [&](int64_t i, uint32_t epoch) {
    if (!is_root) return;
    steps.wait_all_posted(epoch);
    reduce(in + chunks.begin(i), [&](int r) { return steps.slot(r, epoch); }, chunks.bytes(i), out + chunks.begin(i));
  };
  steps.run(chunks.count, /*posts=*/true, fill, take);
}

}  // namespace mnnvl::cpu
