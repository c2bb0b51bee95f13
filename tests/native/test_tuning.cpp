// The choice of algorithm and launch shape: pure functions. That a choice is good is measured; here, that it can be
// run, that it is the one asked for, and that nothing about it jumps.
#include "native/harness.h"
#include "protocol/workspace.h"
#include "tuning/choose.h"
#include "tuning/choose_cpu.h"

namespace mnnvl::test {
namespace {

constexpr Dtype kDtypes[] = {Dtype::kFloat32, Dtype::kFloat16, Dtype::kBFloat16};

GroupShape group_of(int world_size, int64_t workspace_bytes = 64 << 20) {
  GroupShape group;
  group.world_size = world_size;
  group.layout = WorkspaceLayout::for_group(workspace_bytes, world_size);
  return group;
}

// The sizes worth a look: around every power of two.
template <typename Body>
void for_sizes(int64_t most, Body body) {
  for (int64_t size = 1; size <= most; size *= 2) {
    for (int64_t n : {size - 1, size, size + 1}) body(n);
  }
}

TEST(tuning_every_choice_can_be_run) {
  for (int world_size = 2; world_size <= kMaxWorldSize; ++world_size) {
    for (int64_t workspace : {int64_t{1} << 20, int64_t{64} << 20}) {
      const GroupShape group = group_of(world_size, workspace);
      for (Dtype dtype : kDtypes) {
        for (Strategy strategy : {Strategy::kOneShot, Strategy::kTwoShot, Strategy::kAuto}) {
          for_sizes(int64_t{1} << 32, [&](int64_t numel) {
            const AllReduceChoice c = choose_all_reduce(group, numel, dtype, strategy);
            CHECK(c.blocks >= 1 && c.blocks <= group.multiprocessors, c.blocks, " blocks for ", numel);
            CHECK(c.threads >= 32 && c.threads % 32 == 0 && c.threads <= max_all_reduce_threads(world_size), c.threads);
            const bool oneshot = c.algorithm == Algorithm::kOneShotLamport;
            CHECK(strategy == Strategy::kAuto || oneshot == (strategy == Strategy::kOneShot), "asked, not given");
            const int element = element_size(dtype);
            CHECK(c.launch_elements >= 1);
            CHECK(c.launch_elements == (oneshot ? group.layout.oneshot_capacity(world_size, element)
                                                : group.layout.twoshot_capacity(world_size, element)));
          });
        }
      }
    }
  }
}

TEST(tuning_gathers_can_be_run) {
  for (int world_size : {2, 3, 8, kMaxWorldSize}) {
    const GroupShape group = group_of(world_size);
    for_sizes(int64_t{1} << 32, [&](int64_t bytes) {
      const GatherChoice c = choose_gather(group, bytes);
      CHECK(c.blocks >= 1 && c.blocks <= kPipeBlocks && c.blocks <= group.multiprocessors, c.blocks);
      CHECK(c.threads >= 32 && c.threads <= kMaxGatherThreads, c.threads);
    });
  }
}

// One-shot up to some size, two-shot from there on; and the larger the group the sooner.
template <typename IsOneShot>
void check_crossover(IsOneShot is_oneshot) {
  int64_t before = int64_t{1} << 40;
  for (int world_size = 2; world_size <= kMaxWorldSize; ++world_size) {
    CHECK(is_oneshot(16, world_size), "of the smallest tensor, world size ", world_size);
    int64_t last = 0;
    for (int64_t bytes = 16; bytes <= 8 << 20; bytes += 1024) {
      if (!is_oneshot(bytes, world_size)) continue;
      CHECK(last == 0 || last == bytes - 1024, "two crossovers, world size ", world_size, ", ", bytes, " bytes");
      last = bytes;
    }
    CHECK(last < 8 << 20, "no crossover, world size ", world_size);
    CHECK(last <= before, "world size ", world_size, " goes on to ", last, ", a smaller one to ", before);
    before = last;
  }
}

TEST(tuning_one_crossover_for_each_world_size) {
  check_crossover([](int64_t bytes, int world_size) {
    return choose_all_reduce(group_of(world_size), bytes / 4, Dtype::kFloat32, Strategy::kAuto).algorithm ==
           Algorithm::kOneShotLamport;
  });
  check_crossover([](int64_t bytes, int world_size) {
    return choose_cpu_strategy(Strategy::kAuto, bytes, world_size) == Strategy::kOneShot;
  });
}

TEST(tuning_a_wish_is_followed) {
  for (int64_t bytes : {int64_t{4}, int64_t{1} << 30}) {
    for (Strategy wish : {Strategy::kOneShot, Strategy::kTwoShot}) CHECK(choose_cpu_strategy(wish, bytes, 3) == wish);
  }
  const auto too_large = [] { choose_cpu_strategy(Strategy::kAuto, 4, kMaxWorldSize + 1); };
  CHECK(error_of(too_large).kind() == ErrorKind::kInvalidArgument);
}

}  // namespace
}  // namespace mnnvl::test
