// The workspaces of a group whose kernels run under emulation, and what a launch of each rank takes.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "kernels/kernels.h"
#include "native/harness.h"
#include "protocol/arithmetic.h"
#include "transport/cuda_launch.h"

namespace mnnvl::test {

class EmulatedGroup {
 public:
  // `fill`: of all words but those that are zero at rest.
  EmulatedGroup(const WorkspaceLayout& layout, int world_size, uint32_t fill, uint64_t timeout_ms) {
    shape_.world_size = world_size;
    shape_.layout = layout;
    for (int r = 0; r < world_size; ++r) {
      auto* memory = static_cast<std::byte*>(std::aligned_alloc(128, size_t(layout.total_bytes)));
      std::fill_n(reinterpret_cast<uint32_t*>(memory), layout.total_bytes / 4, fill);
      std::memset(memory + layout.lines_offset, 0, size_t(layout.total_bytes - layout.lines_offset));
      memory_.emplace_back(memory);
    }
    mailboxes_.resize(size_t(world_size));
    for (int r = 0; r < world_size; ++r) {
      DeviceGroup group{};
      for (int peer = 0; peer < world_size; ++peer) group.peers[peer] = memory_[size_t(peer)].get();
      group.mailbox = &mailboxes_[size_t(r)];
      group.layout = layout;
      group.timeout_ns = timeout_ms * 1'000'000;
      group.rank = r;
      group.world_size = world_size;
      groups_.push_back(group);
    }
  }

  int world_size() const { return shape_.world_size; }
  const FailureRecord& record(int rank) const { return mailboxes_[size_t(rank)].record; }
  DeviceControl* control(int rank) const {
    return reinterpret_cast<DeviceControl*>(memory_[size_t(rank)].get() + shape_.layout.control_offset);
  }
  // `blocks`: at most so many of a launch, where that isn't what the group has.
  void run(int rank, const Request& request, int blocks = 0) const {
    LaunchContext context;
    context.group = groups_[size_t(rank)];
    context.shape = shape_;
    context.lamport_blocks = blocks;
    launch(context, request);
  }

 protected:
  struct Free {
    void operator()(std::byte* memory) const { std::free(memory); }
  };
  GroupShape shape_;
  std::vector<std::unique_ptr<std::byte, Free>> memory_;
  std::vector<HostMailbox> mailboxes_;
  std::vector<DeviceGroup> groups_;
};

// Of Lamport generations alone.
struct LamportGroup : EmulatedGroup {
  LamportGroup(int world_size, int64_t stage_bytes, int multiprocessors, uint64_t timeout_ms = 20000)
      : EmulatedGroup(WorkspaceLayout::make(stage_bytes, /*channel_bytes=*/0, world_size), world_size, kLamportSentinel,
                      timeout_ms) {
    shape_.multiprocessors = multiprocessors;
  }
  // Every slot of every generation.
  void check_clear() const {
    for (const auto& memory : memory_) {
      const auto* words = reinterpret_cast<const uint32_t*>(memory.get());
      for (int64_t i = 0; i < shape_.layout.slots_offset / 4; ++i) {
        CHECK(words[i] == kLamportSentinel, "word ", i, " is left");
      }
    }
  }
};

// Elements of few bits, of any sign, so that sums round and rows differ.
inline Bytes elements(Random& random, Dtype dtype, int64_t count) {
  Bytes bytes(static_cast<size_t>(count * element_size(dtype)));
  for (int64_t i = 0; i < count; ++i) {
    const float v = float(int(random.below(2001)) - 1000) / 256.0f;
    const uint32_t wide = arithmetic::bits_as<uint32_t>(v);
    const uint32_t bits = dtype == Dtype::kFloat32   ? wide
                          : dtype == Dtype::kFloat16 ? arithmetic::Half::narrow_signed(v)
                                                     : wide >> 16;
    std::memcpy(bytes.data() + i * element_size(dtype), &bits, size_t(element_size(dtype)));
  }
  return bytes;
}

}  // namespace mnnvl::test
