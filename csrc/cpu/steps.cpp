#include "cpu/steps.h"

#include "common/error.h"

namespace mnnvl::cpu {

Steps::Steps(const CommunicatorOptions& options, GroupFailure& failure)
    : rank_(options.rank),
      world_size_(options.world_size),
      segments_(options.segments),
      slot_bytes_(divide(options.segment_bytes, options.world_size).step_slot_bytes),
      own_(control_of(options.segments[options.rank])),
      waiter_(options.rank, options.segments, enough_cores(options.peer_pids), failure, options.slept),
      epoch_(own_->done.epoch.load(std::memory_order_acquire)),
      refreshed_(epoch_),
      freed_(options.segments.size(), epoch_) {}

void Steps::begin(const CallDescriptor& call, int64_t timeout_ms) {
  if (timeout_ms <= 0) fail(ErrorKind::kInvalidArgument, "mnnvl: timeout must be positive, got ", timeout_ms, " ms");
  waiter_.begin(call.operation, timeout_ms);
  call_ = pack(call);
  digest_ = next_digest_;
  // Calls that move nothing count, so that nobody is one call ahead unseen, but their types don't: there is no data to
  // misread.
  next_digest_ = extend_digest(digest_, call.bytes == 0 ? CallDescriptor{call.operation} : call);
}

// Brings words that few operations move up to date: after 2^31 steps a word left behind would compare as ahead. All own
// steps up to epoch_ are complete, so saying so is true.
void Steps::refresh() {
  publish(own_->posted, epoch_);
  publish(own_->reduced, epoch_);
  for (int p = 0; p < world_size_; ++p)
    freed_[p] = control_of(segments_[p])->done.epoch.load(std::memory_order_acquire);
  refreshed_ = epoch_;
}

void Steps::fail_mismatch(int peer, uint32_t epoch, uint32_t seen) {
  const Signal& posted = control_of(segments_[peer])->posted;
  const auto call_at = [&](uint32_t e) { return posted.calls[e % kSlots].load(std::memory_order_relaxed); };
  const auto was_posted = [&](uint32_t e) {
    return (posted.tags[e % kSlots].load(std::memory_order_relaxed) & 0xffffu) == (e & 0xffffu);
  };
  Mismatch mismatch{Mismatch::Kind::kPassed, unpack(call_), {}};
  if (was_posted(epoch)) {
    mismatch.kind = call_at(epoch) == call_ ? Mismatch::Kind::kEarlier : Mismatch::Kind::kCalls;
    mismatch.theirs = unpack(call_at(epoch));
  } else if (was_posted(seen)) {
    mismatch.kind = Mismatch::Kind::kWentOn;
    mismatch.theirs = unpack(call_at(seen));
  }
  waiter_.fail_mismatch(peer, epoch, seen, mismatch);
}

void Steps::fail_pair(int peer, uint32_t epoch, int64_t announced, int64_t expected) {
  Mismatch mismatch{Mismatch::Kind::kPair, unpack(call_), unpack(call_)};
  mismatch.mine.bytes = expected;
  mismatch.theirs.bytes = announced;
  waiter_.fail_mismatch(peer, epoch, epoch, mismatch);
}

}  // namespace mnnvl::cpu
