#include "cpu/arguments.h"
#include "cpu/operations.h"
#include "cpu/reduction.h"

namespace mnnvl::cpu {

// A slot has a part for each peer: what that one is to add up. Parts that differ in size take the steps of the largest.
void run(Steps& steps, const ReduceScatterRequest& request, int64_t timeout_ms) {
  const int rank = steps.rank(), world_size = steps.world_size();
  int64_t largest = 0;
  for (int r = 0; r < world_size; ++r) {
    check_numel(operation_of(request), request.numel_of(r));
    largest = max64(largest, request.numel_of(r));
  }
  const int64_t element_bytes = element_size(request.dtype);
  const Reduction reduce(steps, reduce_function(request.dtype, request.op), request.dtype);
  steps.begin(descriptor_of(request, world_size), timeout_ms);
  if (largest == 0) return;
  const auto in = [&](int r) { return static_cast<const std::byte*>(request.ins[r]); };
  auto* out = static_cast<std::byte*>(request.out);
  if (world_size == 1) {
    if (out != in(0)) copy_bytes(out, in(0), request.numel_of(0) * element_bytes);
    return;
  }
  const Chunks chunks = steps.parted_chunks(largest * element_bytes);
  const auto part = [&](int owner, int peer, uint32_t epoch) {
    return steps.part(owner, peer, epoch, chunks.chunk_bytes);
  };
  const auto bytes_of = [&](int r, int64_t i) {
    return min64(chunks.bytes(i), request.numel_of(r) * element_bytes - chunks.begin(i));
  };
  const auto fill = [&](int64_t i, uint32_t epoch) {
    for (int d = 1; d < world_size; ++d) {
      const int peer = steps.peer(d);
      if (bytes_of(peer, i) <= 0) continue;
      copy_bytes(part(rank, peer, epoch), in(peer) + chunks.begin(i), bytes_of(peer, i));
    }
  };
  const auto take = [&](int64_t i, uint32_t epoch) {
    steps.wait_all_posted(epoch);  // with nothing to add up too: every call is looked at
    if (bytes_of(rank, i) <= 0) return;
    reduce(
        in(rank) + chunks.begin(i), [&](int r) { return part(r, rank, epoch); }, bytes_of(rank, i),
        out + chunks.begin(i));
  };
  steps.run(chunks.count, /*posts=*/true, fill, take);
}

}  // namespace mnnvl::cpu
