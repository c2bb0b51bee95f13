#include "cpu/communicator.h"

#include <variant>

#include "common/error.h"
#include "cpu/operations.h"

namespace mnnvl::cpu {
namespace {

const CommunicatorOptions& checked(const CommunicatorOptions& options) {
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
  const Division division = divide(options.segment_bytes, world_size);
  if (division.step_slot_bytes < least_slot_bytes(world_size) ||
      (world_size > 1 && division.ring_slot_bytes < kMinRingSlotBytes)) {
    invalid("a segment of ", options.segment_bytes, " bytes is too small; at least ",
            segment_bytes_of(least_slot_bytes(world_size), kMinRingSlotBytes, world_size));
  }
  for (std::byte* segment : options.segments) {
    if (segment == nullptr || reinterpret_cast<uintptr_t>(segment) % kCacheLine != 0)
      invalid("a segment isn't aligned to ", kCacheLine);
  }
  return options;
}

}  // namespace

Communicator::Communicator(const CommunicatorOptions& options)
    : failure_(checked(options).rank, options.segments, options.peer_pids),
      steps_(options, failure_),
      messenger_(std::make_shared<Messenger>(options, failure_)) {}

void Communicator::run(const Request& request, int64_t timeout_ms) {
  std::visit([&](const auto& r) { cpu::run(steps_, r, timeout_ms); }, request);
}

size_t default_segment_bytes(int world_size) { return segment_bytes_of(kMaxChunkBytes, kMaxRingSlotBytes, world_size); }

}  // namespace mnnvl::cpu
