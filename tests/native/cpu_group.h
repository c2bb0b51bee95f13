// A CPU group for native tests: threads as ranks over plain memory. The one place of the native tests that knows how
// the communicator is made and called.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <functional>
#include <memory>
#include <vector>

#include "cpu/communicator.h"
#include "cpu/segment.h"
#include "native/harness.h"
#include "tuning/choose_cpu.h"

namespace mnnvl::test {

constexpr int64_t kLongMs = 60000;  // a test that waits so long has failed

struct FreeMemory {
  void operator()(std::byte* memory) const { std::free(memory); }
};

// Every rank's segment, zero-filled.
class Segments {
 public:
  // With about so large slots for steps and for messages.
  Segments(int world_size, int64_t step_slot_bytes, int64_t ring_slot_bytes = cpu::kMinRingSlotBytes)
      : bytes_(cpu::segment_bytes_of(step_slot_bytes, ring_slot_bytes, world_size)) {
    for (int rank = 0; rank < world_size; ++rank) {
      auto* memory = static_cast<std::byte*>(std::aligned_alloc(cpu::kCacheLine, (bytes_ + 63) / 64 * 64));
      std::fill_n(memory, bytes_, std::byte{0});
      memory_.emplace_back(memory);
    }
  }

  // Threads that move messages then sleep until they are woken: a lost wake-up ends the test, by its time.
  Segments& with_unbounded_sleep() {
    max_sleep_ms_ = 3600 * 1000;
    return *this;
  }
  int max_sleep_ms() const { return max_sleep_ms_; }

  int world_size() const { return static_cast<int>(memory_.size()); }
  size_t bytes() const { return bytes_; }
  std::vector<std::byte*> addresses() const {
    std::vector<std::byte*> all;
    for (const auto& memory : memory_) all.push_back(memory.get());
    return all;
  }
  cpu::Control* control(int rank) const { return cpu::control_of(memory_[static_cast<size_t>(rank)].get()); }

  // As if so many steps had been taken, and so many slots of messages.
  void start_from(uint32_t epoch) {
    for (int rank = 0; rank < world_size(); ++rank) {
      for (int source = 0; source < world_size(); ++source) {
        if (source == rank) continue;
        cpu::ChannelWords* words = channel(source, rank).words;
        words->posted.store(epoch);
        words->taken.store(epoch);
      }
    }
    for (int rank = 0; rank < world_size(); ++rank) {
      for (cpu::Signal* signal : {&control(rank)->posted, &control(rank)->reduced, &control(rank)->done})
        signal->epoch.store(epoch);
    }
  }

  cpu::Channel channel(int source, int destination) const {
    const cpu::Division division = cpu::divide(bytes_, world_size());
    return cpu::channel_at(memory_[static_cast<size_t>(destination)].get() + division.rings_offset(),
                           division.ring_slot_bytes, source, destination, world_size());
  }

  // Returns when a thread of `rank` sleeps for messages.
  void await_messenger_asleep(int rank) const {
    while (control(rank)->bell.sleepers.load() == 0) std::this_thread::yield();
  }
  // Returns when somebody sleeps on what `rank` posts.
  void await_sleeper(int rank) const {
    while (control(rank)->posted.sleepers.load() == 0) std::this_thread::yield();
  }

 private:
  size_t bytes_;
  int max_sleep_ms_ = cpu::kMaxSleepMs;
  std::vector<std::unique_ptr<std::byte, FreeMemory>> memory_;
};

// One rank's communicator.
class CpuRank {
 public:
  CpuRank(const Segments& segments, int rank, std::vector<int> peer_pids = {})
      : rank_(rank), world_size_(segments.world_size()) {
    cpu::CommunicatorOptions options;
    options.rank = rank;
    options.world_size = segments.world_size();
    options.segments = segments.addresses();
    options.segment_bytes = segments.bytes();
    options.peer_pids = std::move(peer_pids);
    options.max_sleep_ms = segments.max_sleep_ms();
    options.peer_pids.resize(static_cast<size_t>(segments.world_size()), -1);
    communicator_ = std::make_unique<cpu::Communicator>(options);
  }

  int rank() const { return rank_; }
  // kAuto: by the tuning, as the transport does.
  void all_reduce(AllReduceRequest request) {
    const int64_t bytes = request.numel * element_size(request.dtype);
    request.strategy = choose_cpu_strategy(request.strategy, bytes, world_size_);
    run(request);
  }
  void all_gather(const void* in, void* const* outs, int64_t bytes) { run(AllGatherRequest{in, outs, bytes}); }
  void broadcast(void* data, int64_t bytes, int root) { run(BroadcastRequest{data, bytes, root}); }
  void barrier(int64_t timeout_ms = kLongMs) { run(BarrierRequest{}, timeout_ms); }
  void run(const Request& request, int64_t timeout_ms = kLongMs) { communicator_->run(request, timeout_ms); }
  Messenger& messenger() { return communicator_->messenger(); }
  void abort() { communicator_->abort(); }
  void check() const { communicator_->check(); }

 private:
  int rank_, world_size_;
  std::unique_ptr<cpu::Communicator> communicator_;
};

// `body` on a thread for each rank, after all have made their communicator.
inline void run_group(const Segments& segments, const std::function<void(CpuRank&)>& body) {
  std::vector<std::unique_ptr<CpuRank>> ranks;
  for (int rank = 0; rank < segments.world_size(); ++rank) ranks.push_back(std::make_unique<CpuRank>(segments, rank));
  run_threads(segments.world_size(), [&](int rank) { body(*ranks[static_cast<size_t>(rank)]); });
}

}  // namespace mnnvl::test
