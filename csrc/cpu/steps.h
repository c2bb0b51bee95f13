// What the collectives of cpu/ are made of: the primitives of one rank's part in a step. Their rules, and why following
// them is safe: layout.h. A collective is one free function over them, in a file of its own (operations.h).
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "cpu/layout.h"
#include "cpu/plan.h"
#include "cpu/segment.h"
#include "cpu/wait.h"
#include "protocol/requests.h"

namespace mnnvl::cpu {

// One call at a time, on one thread: begin(), then take_epochs() if the call has steps, then in each step, in this
// order, what the collective needs of: wait_for_slot(), writing slot(rank, e), post(e); wait_posted(), reading peers'
// slots; publish_reduced(e), wait_reduced(); finish(e), which every rank owes in every step. run() is all that for most
// collectives. More epochs may be taken when the steps before are finished. Waits throw as Waiter's.
class Steps {
 public:
  // `failure` must outlive it.
  Steps(const CommunicatorOptions& options, GroupFailure& failure);

  int rank() const { return rank_; }
  int world_size() const { return world_size_; }
  // Ranks in the order in which this one asks them: distances 1 .. world_size - 1, so that not all ask rank 0 first.
  int peer(int distance) const { return (rank_ + distance) % world_size_; }
  std::byte* slot(int rank, uint32_t epoch) const { return slot_of(segments_[rank], slot_bytes_, epoch); }
  // `bytes` cut so that a chunk fits the slot; or `bytes` for each peer, so that the slot has a part() for every one.
  Chunks chunks(int64_t bytes) const { return make_chunks(bytes, chunk_limit(slot_bytes_)); }
  Chunks parted_chunks(int64_t bytes) const { return make_chunks(bytes, part_limit()); }
  int64_t part_limit() const { return cpu::part_limit(slot_bytes_, world_size_); }
  // What `owner` shows `peer` alone in the step, where all its peers get `part_bytes` at most.
  std::byte* part(int owner, int peer, uint32_t epoch, int64_t part_bytes) const {
    return slot(owner, epoch) + part_index(owner, peer) * part_bytes;
  }
  // Lies beside the slot, and is written and read as it is.
  Announcement& announcement(int rank, uint32_t epoch) const {
    return control_of(segments_[rank])->announcements[epoch % kSlots];
  }

  // Starts a call whose arguments are good: its deadline runs from here. Throws if the group is broken.
  void begin(const CallDescriptor& call, int64_t timeout_ms);

  // The steps of most collectives, from 0, in the order that layout.h asks for. A rank that `posts` puts what it shows
  // into its slot by fill(i, epoch), some steps ahead; take(i, epoch) waits for what the rank reads, and reads it.
  template <typename Fill, typename Take>
  void run(int64_t count, bool posts, const Fill& fill, const Take& take) {
    const uint32_t first = take_epochs(count);
    int64_t posted = 0;
    for (int64_t i = 0; i < count; ++i) {
      for (; posts && posted < min64(i + 1 + kPostAhead, count); ++posted) {
        const uint32_t epoch = first + static_cast<uint32_t>(posted);
        wait_for_slot(epoch);
        fill(posted, epoch);
        post(epoch);
      }
      const uint32_t epoch = first + static_cast<uint32_t>(i);
      take(i, epoch);
      finish(epoch);
    }
  }

  // Reserves the epochs of `steps` steps and returns the first.
  uint32_t take_epochs(int64_t steps) {
    if (epoch_ - refreshed_ >= kRefreshSteps) refresh();
    const uint32_t first = epoch_ + 1;
    epoch_ += static_cast<uint32_t>(steps);
    return first;
  }

  // Until nobody reads what was in the slot of `epoch` before, nor the call named for it. `freed_` remembers what was
  // seen, so that most steps read no peer's word.
  void wait_for_slot(uint32_t epoch) {
    const uint32_t needed = epoch - kSlots;
    for (int p = 0; p < world_size_; ++p) {
      if (p != rank_ && !reached(freed_[p], needed)) freed_[p] = waiter_.wait(p, Word::kDone, needed);
    }
  }

  // Shows the peers the own slot, and which call it belongs to.
  void post(uint32_t epoch) {
    own_->posted.calls[epoch % kSlots].store(call_, std::memory_order_relaxed);
    own_->posted.tags[epoch % kSlots].store(tag_of(digest_, epoch), std::memory_order_relaxed);
    publish(own_->posted, epoch);
  }
  void publish_reduced(uint32_t epoch) { publish(own_->reduced, epoch); }
  void finish(uint32_t epoch) { publish(own_->done, epoch); }

  // Until `peer`'s slot can be read. Throws if what it posted belongs to another call than this rank's.
  void wait_posted(int peer, uint32_t epoch) {
    const uint32_t seen = waiter_.wait(peer, Word::kPosted, epoch);
    const Signal& posted = control_of(segments_[peer])->posted;
    if (posted.calls[epoch % kSlots].load(std::memory_order_relaxed) != call_ ||
        posted.tags[epoch % kSlots].load(std::memory_order_relaxed) != tag_of(digest_, epoch)) {
      fail_mismatch(peer, epoch, seen);
    }
  }
  void wait_all_posted(uint32_t epoch) {
    for (int d = 1; d < world_size_; ++d) wait_posted(peer(d), epoch);
  }
  // Ends the call where `peer`'s announcement shows another size than this rank expects.
  [[noreturn]] void fail_pair(int peer, uint32_t epoch, int64_t announced, int64_t expected);

  // Until `peer` has put its reduced slice into its slot. Only after wait_posted(), which looks at the call.
  void wait_reduced(int peer, uint32_t epoch) { waiter_.wait(peer, Word::kReduced, epoch); }

 private:
  static constexpr uint32_t kRefreshSteps = 1u << 20;

  void refresh();
  [[noreturn]] void fail_mismatch(int peer, uint32_t epoch, uint32_t seen);

  const int rank_;
  const int world_size_;
  const std::vector<std::byte*> segments_;
  const int64_t slot_bytes_;
  Control* const own_;
  Waiter waiter_;
  uint32_t epoch_;  // last one used
  uint32_t refreshed_;  // epoch of the last refresh()
  std::vector<uint32_t> freed_;  // [world_size] last `done` seen
  uint64_t call_ = 0;  // this call, packed
  uint64_t digest_ = 0;  // of the calls before it
  uint64_t next_digest_ = 0;  // with it
};

}  // namespace mnnvl::cpu
