#include "cpu/arguments.h"
#include "cpu/operations.h"

namespace mnnvl::cpu {
namespace {

void check(const Steps& steps, const AllToAllRequest& request) {
  const int rank = steps.rank();
  for (int r = 0; r < steps.world_size(); ++r) {
    check_bytes(operation_of(request), request.send_bytes[r]);
    check_bytes(operation_of(request), request.receive_bytes[r]);
  }
  if (request.send_bytes[rank] == request.receive_bytes[rank]) return;
  fail(ErrorKind::kInvalidArgument, "mnnvl: all_to_all: rank ", rank, " sends itself ", request.send_bytes[rank],
       " bytes and expects ", request.receive_bytes[rank]);
}

void announce(Announcement& own, const AllToAllRequest& request, int rank, int world_size) {
  own.largest = 0;
  for (int r = 0; r < world_size; ++r) {
    own.bytes[r] = request.send_bytes[r];
    if (r != rank) own.largest = max64(own.largest, own.bytes[r]);  // what it keeps takes no steps
  }
}

// What was announced for this rank must be what it expects. Returns the largest of all of the peer's.
int64_t checked_largest(Steps& steps, const AllToAllRequest& request, int peer, uint32_t epoch) {
  const Announcement& theirs = steps.announcement(peer, epoch);
  if (theirs.bytes[steps.rank()] != request.receive_bytes[peer]) {
    steps.fail_pair(peer, epoch, theirs.bytes[steps.rank()], request.receive_bytes[peer]);
  }
  return theirs.largest;
}

// Those bytes of every pair that begin at `begin`, in chunks, a part of the slot for each peer.
struct Span {
  Steps& steps;
  const AllToAllRequest& request;
  int64_t begin;
  Chunks chunks;

  static int64_t at_most(int64_t bytes, int64_t left) { return max64(0, min64(bytes, left)); }
  void fill(int64_t i, uint32_t epoch) const {
    const int64_t offset = begin + chunks.begin(i);
    for (int d = 1; d < steps.world_size(); ++d) {
      const int peer = steps.peer(d);
      const int64_t bytes = at_most(chunks.bytes(i), request.send_bytes[peer] - offset);
      if (bytes == 0) continue;
      copy_bytes(steps.part(steps.rank(), peer, epoch, chunks.chunk_bytes),
                 static_cast<const std::byte*>(request.ins[peer]) + offset, bytes);
    }
  }
  // After wait_posted().
  void take(int peer, int64_t i, uint32_t epoch) const {
    const int64_t offset = begin + chunks.begin(i);
    const int64_t bytes = at_most(chunks.bytes(i), request.receive_bytes[peer] - offset);
    if (bytes == 0) return;
    copy_bytes(static_cast<std::byte*>(request.outs[peer]) + offset,
               steps.part(peer, steps.rank(), epoch, chunks.chunk_bytes), bytes);
  }
};

// A rank knows only its own sizes, but all must count the same steps. So there is one step in any case, in which every
// rank announces its sizes beside the first bytes for each peer; after it all know the largest, and with it the rest.
void exchange(Steps& steps, const AllToAllRequest& request) {
  const int64_t first_bytes = steps.part_limit();
  const Span first{steps, request, 0, {first_bytes, first_bytes, 1}};
  int64_t largest = 0;
  const auto announce_and_fill = [&](int64_t i, uint32_t epoch) {
    Announcement& own = steps.announcement(steps.rank(), epoch);
    announce(own, request, steps.rank(), steps.world_size());
    largest = own.largest;
    first.fill(i, epoch);
  };
  const auto check_and_take = [&](int64_t i, uint32_t epoch) {
    for (int d = 1; d < steps.world_size(); ++d) {
      const int peer = steps.peer(d);
      steps.wait_posted(peer, epoch);
      largest = max64(largest, checked_largest(steps, request, peer, epoch));
      first.take(peer, i, epoch);
    }
  };
  steps.run(1, /*posts=*/true, announce_and_fill, check_and_take);

  const Span rest{steps, request, first_bytes, steps.parted_chunks(largest - first_bytes)};
  const auto fill = [&](int64_t i, uint32_t epoch) { rest.fill(i, epoch); };
  const auto take = [&](int64_t i, uint32_t epoch) {
    for (int d = 1; d < steps.world_size(); ++d) {
      const int peer = steps.peer(d);
      steps.wait_posted(peer, epoch);
      rest.take(peer, i, epoch);
    }
  };
  steps.run(rest.chunks.count, /*posts=*/true, fill, take);
}

}  // namespace

void run(Steps& steps, const AllToAllRequest& request, int64_t timeout_ms) {
  check(steps, request);
  steps.begin(descriptor_of(request), timeout_ms);
  if (steps.world_size() > 1) exchange(steps, request);
  const int rank = steps.rank();
  copy_bytes(request.outs[rank], request.ins[rank], request.send_bytes[rank]);
}

}  // namespace mnnvl::cpu
