#include <array>

#include "common/error.h"
#include "cpu/operations.h"
#include "cpu/reduce.h"
#include "system/float_environment.h"

namespace mnnvl::cpu {
namespace {

struct Reduction {  // one all_reduce
  Steps& steps;
  const std::byte* in;
  std::byte* out;
  int element_bytes;
  ReduceFunction function;
  Chunks chunks;
  uint32_t first;  // epoch of chunk 0

  uint32_t epoch(int64_t i) const { return first + static_cast<uint32_t>(i); }
};

// Sums `bytes` of all ranks' contributions to step `epoch`, the own from the input, into the output and `second`.
void reduce(const Reduction& call, uint32_t epoch, int64_t begin, int64_t slot_offset, int64_t bytes,
            std::byte* second) {
  const int world_size = call.steps.world_size();
  std::array<const std::byte*, kMaxWorldSize> sources;
  for (int r = 0; r < world_size; ++r) {
    sources[r] = r == call.steps.rank() ? call.in + begin : call.steps.slot(r, epoch) + slot_offset;
  }
  call.function(sources.data(), world_size, call.out + begin, second, bytes / call.element_bytes,
                static_cast<float>(world_size));
}

void post_chunk(const Reduction& call, int64_t i) {
  Steps& steps = call.steps;
  const uint32_t epoch = call.epoch(i);
  steps.wait_for_slot(epoch);
  copy_bytes(steps.slot(steps.rank(), epoch), call.in + call.chunks.begin(i), call.chunks.bytes(i));
  steps.post(epoch);
}

// Every rank reads everything and adds it up for itself: one wait per step.
void one_shot(const Reduction& call) {
  post_chunk(call, 0);
  for (int64_t i = 0; i < call.chunks.count; ++i) {
    if (i + kPostAhead < call.chunks.count) post_chunk(call, i + kPostAhead);
    const uint32_t epoch = call.epoch(i);
    call.steps.wait_all_posted(epoch);
    reduce(call, epoch, call.chunks.begin(i), /*slot_offset=*/0, call.chunks.bytes(i), /*second=*/nullptr);
    call.steps.finish(epoch);
  }
}

// Shows the peers the slices that they own; the own one is left out.
void post_slices(const Reduction& call, int64_t i) {
  Steps& steps = call.steps;
  const uint32_t epoch = call.epoch(i);
  const int64_t bytes = call.chunks.bytes(i);
  const std::byte* in = call.in + call.chunks.begin(i);
  steps.wait_for_slot(epoch);
  std::byte* to = steps.slot(steps.rank(), epoch);
  const Slice mine = slice_of(bytes, steps.rank(), steps.world_size());
  const int64_t behind = mine.begin + mine.bytes;
  copy_bytes(to, in, mine.begin);
  copy_bytes(to + behind, in + behind, bytes - behind);
  steps.post(epoch);
}

void reduce_slice(const Reduction& call, int64_t i) {
  Steps& steps = call.steps;
  const uint32_t epoch = call.epoch(i);
  const Slice mine = slice_of(call.chunks.bytes(i), steps.rank(), steps.world_size());
  steps.wait_all_posted(epoch);  // with an empty slice too: copy_slices() reads what only a look at the call allows
  if (mine.bytes > 0) {
    reduce(call, epoch, call.chunks.begin(i) + mine.begin, mine.begin, mine.bytes,
           steps.slot(steps.rank(), epoch) + mine.begin);
  }
  steps.publish_reduced(epoch);
}

void copy_slices(const Reduction& call, int64_t i) {
  Steps& steps = call.steps;
  const uint32_t epoch = call.epoch(i);
  for (int d = 1; d < steps.world_size(); ++d) {
    const int peer = steps.peer(d);
    const Slice theirs = slice_of(call.chunks.bytes(i), peer, steps.world_size());
    if (theirs.bytes == 0) continue;
    steps.wait_reduced(peer, epoch);
    copy_bytes(call.out + call.chunks.begin(i) + theirs.begin, steps.slot(peer, epoch) + theirs.begin, theirs.bytes);
  }
  steps.finish(epoch);
}

// Every rank adds up its slice and hands the result to all: two waits per step, but each byte is read from a peer only
// twice.
void two_shot(const Reduction& call) {
  post_slices(call, 0);
  for (int64_t i = 0; i < call.chunks.count + kCopyBehind; ++i) {
    if (i + kPostAhead < call.chunks.count) post_slices(call, i + kPostAhead);
    if (i < call.chunks.count) reduce_slice(call, i);
    if (i >= kCopyBehind) copy_slices(call, i - kCopyBehind);
  }
}

}  // namespace

void run(Steps& steps, const AllReduceRequest& request, int64_t timeout_ms) {
  if (request.numel < 0) fail(ErrorKind::kInvalidArgument, "mnnvl: all_reduce of ", request.numel, " elements");
  if (request.strategy != Strategy::kOneShot && request.strategy != Strategy::kTwoShot) {
    fail(ErrorKind::kInvalidArgument, "mnnvl: all_reduce: expected the strategy oneshot or twoshot, got ",
         static_cast<int>(request.strategy), "; the transport makes a choice of auto");
  }
  const CallDescriptor descriptor = descriptor_of(request);
  steps.begin(descriptor, timeout_ms);
  if (descriptor.bytes == 0) return;
  if (steps.world_size() == 1) {
    if (request.out != request.in) copy_bytes(request.out, request.in, descriptor.bytes);
    return;
  }
  FloatEnvironment ieee;
  const Chunks chunks = steps.chunks(descriptor.bytes);
  const Reduction call{steps,
                       static_cast<const std::byte*>(request.in),
                       static_cast<std::byte*>(request.out),
                       element_size(request.dtype),
                       reduce_function(request.dtype, request.op),
                       chunks,
                       steps.take_epochs(chunks.count)};
  if (request.strategy == Strategy::kOneShot) {
    one_shot(call);
  } else {
    two_shot(call);
  }
}

}  // namespace mnnvl::cpu
