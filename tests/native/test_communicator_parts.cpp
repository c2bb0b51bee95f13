// The CPU communicator's collectives whose ranks have parts of their own, and those that reduce: random calls in random
// order, every byte against the definition.
#include "native/cpu_group.h"
#include "native/random_calls.h"

namespace mnnvl::test {
namespace {

void run_programs(int world_size, int64_t slot_bytes, int64_t most_bytes, int calls, uint32_t first_epoch = 0) {
  Segments segments(world_size, slot_bytes);
  segments.start_from(first_epoch);
  run_group(segments, [&](CpuRank& rank) {
    for (int i = 0; i < calls; ++i) {
      const Call call{world_size, static_cast<uint64_t>(i) + first_epoch, most_bytes};
      check_any(rank, call);
    }
  });
}

TEST(communicator_parts_of_worlds) {
  for (int world_size : {2, 3, 4, 5, 8}) run_programs(world_size, 64 << 10, 20000, iterations(300));
}
// Slots of a line for each peer and little more.
TEST(communicator_parts_in_many_steps) {
  for (int world_size : {2, 3, 4, 5, 8}) {
    run_programs(world_size, 64 * (world_size - 1), 3000, iterations(150));
    run_programs(world_size, 64 * (2 * world_size + 1), 9000, iterations(150));
  }
}
TEST(communicator_parts_around_the_wrap) { run_programs(3, 256, 3000, iterations(150), 0xffffff80u); }

// Sizes that end with a slot, or a byte beside: by ones, in all operations.
TEST(communicator_parts_at_the_edges_of_slots) {
  const int world_size = 3;
  const Segments segments(world_size, 512);
  const int64_t part = cpu::part_limit(cpu::divide(segments.bytes(), world_size).step_slot_bytes, world_size);
  run_group(segments, [&](CpuRank& rank) {
    for (int64_t bytes : {part - 1, part, part + 1, 2 * part, 2 * part + 1, 3 * part}) {
      Bytes in(static_cast<size_t>(3 * bytes), static_cast<std::byte>(rank.rank())), out(in.size());
      const void* ins[] = {in.data(), in.data() + bytes, in.data() + 2 * bytes};
      void* outs[] = {out.data(), out.data() + bytes, out.data() + 2 * bytes};
      const int64_t sizes[] = {bytes, bytes, bytes};
      rank.run(AllToAllRequest{ins, sizes, outs, sizes, Dtype::kInt8});
      for (int64_t i = 0; i < 3 * bytes; ++i) CHECK(out[size_t(i)] == std::byte(i / bytes), bytes, " ", i);
      rank.run(ReduceScatterRequest{ins, out.data(), bytes, nullptr, Dtype::kInt8, ReduceOp::kSum});
      rank.run(GatherRequest{out.data(), outs, bytes, 0});
      rank.run(ScatterRequest{ins, out.data(), bytes, 1});
      for (int64_t i = 0; i < bytes; ++i) CHECK(out[size_t(i)] == std::byte{1}, bytes, " ", i);
      for (int64_t i = bytes; i < 3 * bytes && rank.rank() == 0; ++i) CHECK(out[size_t(i)] == std::byte{3}, bytes, i);
    }
  });
}

}  // namespace
}  // namespace mnnvl::test
