#include "cpu/arguments.h"
#include "cpu/operations.h"
#include "cpu/reduction.h"

namespace mnnvl::cpu {
namespace {

struct Call {  // one all_reduce
  Steps& steps;
  const Reduction& reduce;
  const std::byte* in;
  std::byte* out;
  Chunks chunks;

  Slice slice(int64_t i, int owner) const { return slice_of(chunks.bytes(i), owner, steps.world_size()); }
};

// Every rank reads everything and adds it up for itself: one wait per step.
void one_shot(const Call& call) {
  Steps& steps = call.steps;
  const Chunks& chunks = call.chunks;
  const auto fill = [&](int64_t i, uint32_t epoch) {
    copy_bytes(steps.slot(steps.rank(), epoch), call.in + chunks.begin(i), chunks.bytes(i));
  };
  const auto take = [&](int64_t i, uint32_t epoch) {
    steps.wait_all_posted(epoch);
    call.reduce(
        call.in + chunks.begin(i), [&](int r) { return steps.slot(r, epoch); }, chunks.bytes(i),
        call.out + chunks.begin(i));
  };
  steps.run(chunks.count, /*posts=*/true, fill, take);
}

// Shows the peers the slices that they own; the own one is left out.
void post_slices(const Call& call, int64_t i, uint32_t epoch) {
  Steps& steps = call.steps;
  const std::byte* in = call.in + call.chunks.begin(i);
  steps.wait_for_slot(epoch);
  std::byte* to = steps.slot(steps.rank(), epoch);
  const Slice mine = call.slice(i, steps.rank());
  const int64_t behind = mine.begin + mine.bytes;
  copy_bytes(to, in, mine.begin);
  copy_bytes(to + behind, in + behind, call.chunks.bytes(i) - behind);
  steps.post(epoch);
}

void reduce_slice(const Call& call, int64_t i, uint32_t epoch) {
  Steps& steps = call.steps;
  const Slice mine = call.slice(i, steps.rank());
  steps.wait_all_posted(epoch);  // with an empty slice too: copy_slices() reads what only a look at the call allows
  if (mine.bytes > 0) {
    const int64_t begin = call.chunks.begin(i) + mine.begin;
    call.reduce(
        call.in + begin, [&](int r) { return steps.slot(r, epoch) + mine.begin; }, mine.bytes, call.out + begin,
        steps.slot(steps.rank(), epoch) + mine.begin);
  }
  steps.publish_reduced(epoch);
}

void copy_slices(const Call& call, int64_t i, uint32_t epoch) {
  Steps& steps = call.steps;
  for (int d = 1; d < steps.world_size(); ++d) {
    const int peer = steps.peer(d);
    const Slice theirs = call.slice(i, peer);
    if (theirs.bytes == 0) continue;
    steps.wait_reduced(peer, epoch);
    copy_bytes(call.out + call.chunks.begin(i) + theirs.begin, steps.slot(peer, epoch) + theirs.begin, theirs.bytes);
  }
  steps.finish(epoch);
}

// Every rank adds up its slice and hands the result to all: two waits per step, but each byte is read from a peer only
// twice.
void two_shot(const Call& call) {
  const int64_t count = call.chunks.count;
  const uint32_t first = call.steps.take_epochs(count);
  const auto epoch = [&](int64_t i) { return first + static_cast<uint32_t>(i); };
  post_slices(call, 0, epoch(0));
  for (int64_t i = 0; i < count + kCopyBehind; ++i) {
    if (i + kPostAhead < count) post_slices(call, i + kPostAhead, epoch(i + kPostAhead));
    if (i < count) reduce_slice(call, i, epoch(i));
    if (i >= kCopyBehind) copy_slices(call, i - kCopyBehind, epoch(i - kCopyBehind));
  }
}

}  // namespace

void run(Steps& steps, const AllReduceRequest& request, int64_t timeout_ms) {
  all_reduce(steps, request, descriptor_of(request), timeout_ms);
}

void all_reduce(Steps& steps, const AllReduceRequest& request, const CallDescriptor& descriptor, int64_t timeout_ms) {
  check_numel(operation_of(request), request.numel);
  if (request.strategy != Strategy::kOneShot && request.strategy != Strategy::kTwoShot) {
    fail(ErrorKind::kInvalidArgument, "mnnvl: all_reduce: expected the strategy oneshot or twoshot, got ",
         static_cast<int>(request.strategy), "; the transport makes a choice of auto");
  }
  const Reduction reduce(steps, reduce_function(request.dtype, request.op), request.dtype);
  steps.begin(descriptor, timeout_ms);
  if (descriptor.bytes == 0) return;
  if (steps.world_size() == 1) {
    if (request.out != request.in) copy_bytes(request.out, request.in, descriptor.bytes);
    return;
  }
  const Call call{steps, reduce, static_cast<const std::byte*>(request.in), static_cast<std::byte*>(request.out),
                  steps.chunks(descriptor.bytes)};
  if (request.strategy == Strategy::kOneShot) {
    one_shot(call);
  } else {
    two_shot(call);
  }
}

}  // namespace mnnvl::cpu
