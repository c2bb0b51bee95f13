#include "cpu/communicator.h"

#include <cstring>

#include "common/error.h"
#include "common/math.h"
#include "cpu/float_environment.h"
#include "cpu/layout.h"
#include "cpu/plan.h"
#include "cpu/reduce.h"
#include "cpu/wait.h"

namespace mnnvl::cpu {
namespace {

constexpr uint32_t kRefreshSteps = 1u << 20;

void copy_bytes(void* to, const void* from, int64_t bytes) {
  if (bytes > 0) std::memcpy(to, from, static_cast<size_t>(bytes));
}

class SegmentCommunicator final : public Communicator {
 public:
  explicit SegmentCommunicator(const CommunicatorOptions& options)
      : rank_(options.rank),
        world_size_(options.world_size),
        segments_(options.segments),
        slot_bytes_(slot_bytes(options.segment_bytes)),
        own_(control_of(options.segments[options.rank])),
        waiter_(options.rank, options.segments, options.peer_pids),
        epoch_(own_->done.epoch.load(std::memory_order_acquire)),
        refreshed_(epoch_),
        freed_(options.segments.size(), epoch_),
        sources_(options.segments.size()) {}

  void all_reduce(const void* in, void* out, int64_t numel, Dtype dtype, ReduceOp op, Strategy strategy,
                  int64_t timeout_ms) override;
  void all_gather(const void* in, void* const* outs, int64_t bytes, int64_t timeout_ms) override;
  void broadcast(void* data, int64_t bytes, int root, int64_t timeout_ms) override;
  void barrier(int64_t timeout_ms) override;
  void abort() override { waiter_.abort(); }
  void check() const override { waiter_.check(); }

 private:
  struct Reduction {  // one all_reduce
    const std::byte* in;
    std::byte* out;
    int element_bytes;
    ReduceFunction function;
    Chunks chunks;
    uint32_t first;  // epoch of chunk 0
  };

  std::byte* slot(int rank, uint32_t epoch) const { return slot_of(segments_[rank], slot_bytes_, epoch); }
  int peer(int distance) const { return (rank_ + distance) % world_size_; }

  // Reserves the epochs of `steps` steps and returns the first.
  uint32_t take_epochs(int64_t steps) {
    if (epoch_ - refreshed_ >= kRefreshSteps) refresh();
    const uint32_t first = epoch_ + 1;
    epoch_ += static_cast<uint32_t>(steps);
    return first;
  }

  void wait_for_all(Word word, uint32_t epoch) {
    for (int d = 1; d < world_size_; ++d) waiter_.wait(peer(d), word, epoch);
  }

  // Until nobody reads what the slot of `epoch` held before. `freed_` remembers what was seen, so that most steps read
  // no peer's word.
  void wait_for_slot(uint32_t epoch) {
    const uint32_t needed = epoch - kGenerations;
    for (int p = 0; p < world_size_; ++p) {
      if (p != rank_ && !reached(freed_[p], needed)) freed_[p] = waiter_.wait(p, Word::kDone, needed);
    }
  }

  void refresh();
  void check_timeout(int64_t timeout_ms) const;
  void one_shot(const Reduction& call);
  void two_shot(const Reduction& call);
  void post_slices(const Reduction& call, int64_t i);
  void reduce_slice(const Reduction& call, int64_t i);
  void copy_slices(const Reduction& call, int64_t i);
  void reduce(const Reduction& call, uint32_t epoch, int64_t begin, int64_t slot_offset, int64_t bytes,
              std::byte* second);

  const int rank_;
  const int world_size_;
  const std::vector<std::byte*> segments_;
  const int64_t slot_bytes_;
  Control* const own_;
  Waiter waiter_;
  uint32_t epoch_;                         // last one used
  uint32_t refreshed_;                     // epoch of the last refresh()
  std::vector<uint32_t> freed_;            // [world_size] last `done` seen
  std::vector<const std::byte*> sources_;  // [world_size] scratch of reduce()
};

// Brings words that few operations move up to date: after 2^31 steps a word left behind would compare as ahead. All own
// steps up to epoch_ are complete, so saying so is true.
void SegmentCommunicator::refresh() {
  publish(own_->posted, epoch_);
  publish(own_->reduced, epoch_);
  for (int p = 0; p < world_size_; ++p)
    freed_[p] = control_of(segments_[p])->done.epoch.load(std::memory_order_acquire);
  refreshed_ = epoch_;
}

void SegmentCommunicator::check_timeout(int64_t timeout_ms) const {
  if (timeout_ms <= 0) fail(ErrorKind::kInvalidArgument, "mnnvl: timeout must be positive, got ", timeout_ms, " ms");
}

void SegmentCommunicator::all_reduce(const void* in, void* out, int64_t numel, Dtype dtype, ReduceOp op,
                                     Strategy strategy, int64_t timeout_ms) {
  if (numel < 0) fail(ErrorKind::kInvalidArgument, "mnnvl: all_reduce of ", numel, " elements");
  check_timeout(timeout_ms);
  waiter_.begin(Operation::kAllReduce, timeout_ms);
  if (numel == 0) return;
  const int64_t bytes = numel * element_size(dtype);
  if (world_size_ == 1) {
    if (out != in) copy_bytes(out, in, bytes);
    return;
  }
  FloatEnvironment ieee;
  Reduction call;
  call.in = static_cast<const std::byte*>(in);
  call.out = static_cast<std::byte*>(out);
  call.element_bytes = element_size(dtype);
  call.function = reduce_function(dtype, op);
  call.chunks = make_chunks(bytes, slot_bytes_);
  call.first = take_epochs(call.chunks.count);
  if (select_strategy(strategy, bytes, world_size_) == Strategy::kOneShot) {
    one_shot(call);
  } else {
    two_shot(call);
  }
}

// Sums `bytes` of all ranks' contributions to step `epoch`, the own from the input, into the output and `second`.
void SegmentCommunicator::reduce(const Reduction& call, uint32_t epoch, int64_t begin, int64_t slot_offset,
                                 int64_t bytes, std::byte* second) {
  for (int r = 0; r < world_size_; ++r) {
    sources_[r] = r == rank_ ? call.in + begin : slot(r, epoch) + slot_offset;
  }
  call.function(sources_.data(), world_size_, call.out + begin, second, bytes / call.element_bytes,
                static_cast<float>(world_size_));
}

// Every rank reads everything and adds it up for itself: one wait per step.
void SegmentCommunicator::one_shot(const Reduction& call) {
  const auto post = [&](int64_t i) {
    const uint32_t epoch = call.first + static_cast<uint32_t>(i);
    wait_for_slot(epoch);
    copy_bytes(slot(rank_, epoch), call.in + call.chunks.begin(i), call.chunks.bytes(i));
    publish(own_->posted, epoch);
  };
  post(0);
  for (int64_t i = 0; i < call.chunks.count; ++i) {
    if (i + kPostAhead < call.chunks.count) post(i + kPostAhead);
    const uint32_t epoch = call.first + static_cast<uint32_t>(i);
    wait_for_all(Word::kPosted, epoch);
    reduce(call, epoch, call.chunks.begin(i), /*slot_offset=*/0, call.chunks.bytes(i), /*second=*/nullptr);
    publish(own_->done, epoch);
  }
}

// Every rank adds up its slice and hands the result to all: two waits per step, but each byte is read from a peer only
// twice.
void SegmentCommunicator::two_shot(const Reduction& call) {
  post_slices(call, 0);
  for (int64_t i = 0; i < call.chunks.count + kCopyBehind; ++i) {
    if (i + kPostAhead < call.chunks.count) post_slices(call, i + kPostAhead);
    if (i < call.chunks.count) reduce_slice(call, i);
    if (i >= kCopyBehind) copy_slices(call, i - kCopyBehind);
  }
}

// Shows the peers the slices that they own; the own one is left out.
void SegmentCommunicator::post_slices(const Reduction& call, int64_t i) {
  const uint32_t epoch = call.first + static_cast<uint32_t>(i);
  const int64_t bytes = call.chunks.bytes(i);
  const std::byte* in = call.in + call.chunks.begin(i);
  wait_for_slot(epoch);
  std::byte* to = slot(rank_, epoch);
  const Slice mine = slice_of(bytes, rank_, world_size_);
  const int64_t behind = mine.begin + mine.bytes;
  copy_bytes(to, in, mine.begin);
  copy_bytes(to + behind, in + behind, bytes - behind);
  publish(own_->posted, epoch);
}

void SegmentCommunicator::reduce_slice(const Reduction& call, int64_t i) {
  const uint32_t epoch = call.first + static_cast<uint32_t>(i);
  const Slice mine = slice_of(call.chunks.bytes(i), rank_, world_size_);
  if (mine.bytes > 0) {
    wait_for_all(Word::kPosted, epoch);
    reduce(call, epoch, call.chunks.begin(i) + mine.begin, mine.begin, mine.bytes, slot(rank_, epoch) + mine.begin);
  }
  publish(own_->reduced, epoch);
}

void SegmentCommunicator::copy_slices(const Reduction& call, int64_t i) {
  const uint32_t epoch = call.first + static_cast<uint32_t>(i);
  for (int d = 1; d < world_size_; ++d) {
    const Slice theirs = slice_of(call.chunks.bytes(i), peer(d), world_size_);
    if (theirs.bytes == 0) continue;
    waiter_.wait(peer(d), Word::kReduced, epoch);
    copy_bytes(call.out + call.chunks.begin(i) + theirs.begin, slot(peer(d), epoch) + theirs.begin, theirs.bytes);
  }
  publish(own_->done, epoch);
}

void SegmentCommunicator::all_gather(const void* in, void* const* outs, int64_t bytes, int64_t timeout_ms) {
  if (bytes < 0) fail(ErrorKind::kInvalidArgument, "mnnvl: all_gather of ", bytes, " bytes");
  check_timeout(timeout_ms);
  waiter_.begin(Operation::kAllGather, timeout_ms);
  if (bytes == 0) return;
  const auto* from = static_cast<const std::byte*>(in);
  if (world_size_ > 1) {
    const Chunks chunks = make_chunks(bytes, slot_bytes_);
    const uint32_t first = take_epochs(chunks.count);
    const auto post = [&](int64_t i) {
      const uint32_t epoch = first + static_cast<uint32_t>(i);
      wait_for_slot(epoch);
      copy_bytes(slot(rank_, epoch), from + chunks.begin(i), chunks.bytes(i));
      publish(own_->posted, epoch);
    };
    post(0);
    for (int64_t i = 0; i < chunks.count; ++i) {
      if (i + kPostAhead < chunks.count) post(i + kPostAhead);
      const uint32_t epoch = first + static_cast<uint32_t>(i);
      for (int d = 1; d < world_size_; ++d) {
        waiter_.wait(peer(d), Word::kPosted, epoch);
        copy_bytes(static_cast<std::byte*>(outs[peer(d)]) + chunks.begin(i), slot(peer(d), epoch), chunks.bytes(i));
      }
      publish(own_->done, epoch);
    }
  }
  if (outs[rank_] != in) copy_bytes(outs[rank_], in, bytes);
}

void SegmentCommunicator::broadcast(void* data, int64_t bytes, int root, int64_t timeout_ms) {
  if (root < 0 || root >= world_size_) {
    fail(ErrorKind::kInvalidArgument, "mnnvl: broadcast from rank ", root, " in a group of ", world_size_);
  }
  if (bytes < 0) fail(ErrorKind::kInvalidArgument, "mnnvl: broadcast of ", bytes, " bytes");
  check_timeout(timeout_ms);
  waiter_.begin(Operation::kBroadcast, timeout_ms);
  if (bytes == 0 || world_size_ == 1) return;
  auto* at = static_cast<std::byte*>(data);
  const Chunks chunks = make_chunks(bytes, slot_bytes_);
  const uint32_t first = take_epochs(chunks.count);
  for (int64_t i = 0; i < chunks.count; ++i) {
    const uint32_t epoch = first + static_cast<uint32_t>(i);
    if (rank_ == root) {
      wait_for_slot(epoch);
      copy_bytes(slot(rank_, epoch), at + chunks.begin(i), chunks.bytes(i));
      publish(own_->posted, epoch);
    } else {
      waiter_.wait(root, Word::kPosted, epoch);
      copy_bytes(at + chunks.begin(i), slot(root, epoch), chunks.bytes(i));
    }
    publish(own_->done, epoch);
  }
}

void SegmentCommunicator::barrier(int64_t timeout_ms) {
  check_timeout(timeout_ms);
  waiter_.begin(Operation::kBarrier, timeout_ms);
  if (world_size_ == 1) return;
  const uint32_t epoch = take_epochs(1);
  publish(own_->posted, epoch);  // writes no slot, so waits for none
  wait_for_all(Word::kPosted, epoch);
  publish(own_->done, epoch);
}

}  // namespace

std::unique_ptr<Communicator> Communicator::create(const CommunicatorOptions& options) {
  const auto invalid = [](const auto&... what) {
    fail(ErrorKind::kInvalidArgument, "mnnvl: cpu communicator: ", what...);
  };
  const int world_size = options.world_size;
  if (world_size < 1 || world_size > kMaxWorldSize)
    invalid("world size ", world_size, " is not in 1 .. ", kMaxWorldSize);
  if (options.rank < 0 || options.rank >= world_size) invalid("rank ", options.rank, " of ", world_size);
  if (static_cast<int>(options.segments.size()) != world_size)
    invalid(options.segments.size(), " segments for ", world_size, " ranks");
  if (static_cast<int>(options.peer_pids.size()) != world_size)
    invalid(options.peer_pids.size(), " pids for ", world_size, " ranks");
  if (slot_bytes(options.segment_bytes) < static_cast<int64_t>(kCacheLine)) {
    invalid("a segment of ", options.segment_bytes, " bytes is too small; at least ",
            kControlBytes + kGenerations * kCacheLine);
  }
  for (std::byte* segment : options.segments) {
    if (segment == nullptr || reinterpret_cast<uintptr_t>(segment) % kCacheLine != 0)
      invalid("a segment isn't aligned to ", kCacheLine);
  }
  return std::make_unique<SegmentCommunicator>(options);
}

size_t default_segment_bytes(int /*world_size*/) {
  return kControlBytes + static_cast<size_t>(kGenerations) * kMaxChunkBytes;
}

}  // namespace mnnvl::cpu
