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
            if (oneshot) {
              CHECK(c.launch_elements == group.layout.oneshot_capacity(world_size, element));
              return;
            }
            if (numel == 0) return;
            // The windows are the launch, whose last is not empty.
            const int64_t packs = ceil_div(min64(numel, c.launch_elements) * element, kPackBytes);
            const int64_t slice = slice_packs(packs, world_size);
            CHECK(slice <= int64_t{c.windows} * c.window_packs && slice > int64_t{c.windows - 1} * c.window_packs,
                  c.windows, " windows of ", c.window_packs, " for ", slice);
          });
        }
      }
    }
  }
}

// A stage has room for a generation's windows of all slices that lie there, and what csrc/README.md asks for: all but
// the last are of one size, and only in the last two may a rank be without packs.
TEST(tuning_windows_fit_into_a_generation) {
  for (int world_size = 2; world_size <= kMaxWorldSize; ++world_size) {
    for (int64_t workspace : {int64_t{1} << 20, int64_t{64} << 20, int64_t{1} << 40}) {
      for (bool multicast : {false, true}) {
        GroupShape group = group_of(world_size, workspace);
        group.multicast = multicast;
        const int64_t slots = multicast ? world_size : world_size - 1, stage = group.layout.generation_bytes / 2;
        for_sizes(int64_t{1} << 34, [&](int64_t numel) {
          const AllReduceChoice c = choose_all_reduce(group, numel, Dtype::kBFloat16, Strategy::kTwoShot);
          const int64_t room = (c.windows == 1 ? 1 : kGenerationWindows) * slots * c.window_packs * kPackBytes;
          CHECK(room <= stage, room, " bytes of ", stage, " for ", numel, " among ", world_size);
          CHECK(c.windows == 1 || c.window_packs >= uint32_t(world_size), c.window_packs, " packs a window");
          CHECK(c.launch_elements * 2 <= int64_t{kPackBytes} << 31, "packs are counted in 32 bits");
        });
      }
    }
  }
}

TEST(tuning_reduce_scatters_fit_into_a_generation) {
  for (int world_size = 2; world_size <= kMaxWorldSize; ++world_size) {
    for (int64_t workspace : {int64_t{1} << 20, int64_t{64} << 20, int64_t{1} << 40}) {
      const GroupShape group = group_of(world_size, workspace);
      for_sizes(int64_t{1} << 34, [&](int64_t numel) {
        if (numel == 0) return;
        const WindowShape c = choose_reduce_scatter(group, numel, Dtype::kBFloat16);
        const int64_t windows = c.windows == 1 ? 1 : kGenerationWindows;
        CHECK(windows * (world_size - 1) * c.window_packs * kPackBytes <= group.layout.generation_bytes,
              c.window_packs);
        const int64_t packs = ceil_div(min64(numel, c.launch_elements) * 2, kPackBytes);
        CHECK(packs <= int64_t{c.windows} * c.window_packs && packs > int64_t{c.windows - 1} * c.window_packs,
              c.windows, " windows of ", c.window_packs, " for ", packs);
      });
    }
  }
}

// Blocks that take multiprocessors whole: few, and only where messages leave them some.
TEST(tuning_few_blocks_take_multiprocessors_whole) {
  for (int world_size = 2; world_size <= kMaxWorldSize; ++world_size) {
    for (int blocks : {0, 1, 32, 33, 34, 64}) {
      GroupShape group = group_of(world_size);
      group.max_blocks = blocks;
      const int most = max_all_reduce_threads(world_size);
      const bool room = 2 * (world_size - 1) <= 99 && blocks > 0 && blocks <= 33;
      const auto sum = choose_all_reduce(group, int64_t{1} << 30, Dtype::kBFloat16, Strategy::kTwoShot);
      const auto scatter = choose_reduce_scatter(group, int64_t{1} << 30, Dtype::kBFloat16);
      CHECK(world_size > 8 || sum.threads == (room ? 2 * most : most), sum.threads, " threads");
      for (int threads : {sum.threads, scatter.threads}) CHECK(threads <= most || room, threads, " threads");
      CHECK(sum.blocks <= (blocks > 0 ? blocks : group.multiprocessors), sum.blocks, " blocks");
      CHECK(choose_all_reduce(group, 100, Dtype::kBFloat16, Strategy::kTwoShot).threads <= most);
      CHECK(choose_all_reduce(group, 1 << 20, Dtype::kBFloat16, Strategy::kOneShot).threads <= most);
    }
  }
}

TEST(tuning_a_large_all_reduce_is_one_launch) {
  for (int world_size : {2, 3, 4, 8, 72}) {
    for (int64_t numel : {int64_t{16} << 20, (int64_t{64} << 20) + 1, int64_t{1} << 30}) {
      const auto c = choose_all_reduce(group_of(world_size), numel, Dtype::kBFloat16, Strategy::kAuto);
      CHECK(c.windows > 1 && c.launch_elements >= numel, c.windows, " windows, ", c.launch_elements, " elements");
    }
    CHECK(choose_all_reduce(group_of(world_size), 1 << 19, Dtype::kBFloat16, Strategy::kTwoShot).windows == 1);
  }
}

TEST(tuning_exchanges_can_be_run) {
  for (int world_size = 2; world_size <= kMaxWorldSize; ++world_size) {
    const GroupShape group = group_of(world_size);
    for (int lanes = 1; lanes <= kMaxLanes; ++lanes) {
      for (int channels = 0; channels < world_size; ++channels) {
        for (ChannelKind kind : {ChannelKind::kCollective, ChannelKind::kPointToPoint}) {
          const int blocks = choose_exchange_blocks(group, kind, channels, lanes), all = channels * lanes;
          CHECK(blocks <= all && (blocks > 0) == (channels > 0), blocks, " blocks for ", all, " lanes");
          CHECK(channels == 0 || ceil_div(all, blocks) <= kMaxBlockLanes, "a signal warp has a thread a lane");
        }
      }
      // No launch takes more than it may, but for the lanes that a block can't serve.
      GroupShape few = group;
      for (few.max_blocks = 1; few.max_blocks < 40; few.max_blocks += 3) {
        const int least = int(ceil_div(int64_t{world_size - 1} * lanes, kMaxBlockLanes));
        const int one = choose_exchange_blocks(few, ChannelKind::kCollective, world_size - 1, lanes);
        CHECK(one == least || 3 * one <= few.max_blocks || one == 1, one, " blocks of ", few.max_blocks);
      }
      // Everything that can wait at once is on the GPU at once.
      const int one = choose_exchange_blocks(group, ChannelKind::kPointToPoint, 1, lanes);
      CHECK(one == 1 || 2 * (world_size - 1) * one <= 3 * group.multiprocessors / 4, one, " a peer and direction");
    }
  }
}

// Every byte of a message lies in one piece, and every piece fits where it goes.
TEST(tuning_messages_are_cut_whole) {
  for (int world_size : {2, 3, 4, 8, 36, kMaxWorldSize}) {
    for (int64_t workspace : {int64_t{1} << 20, int64_t{64} << 20}) {
      const ChannelLayout layout = group_of(world_size, workspace).layout.channel;
      CHECK(layout.lanes >= 1 && layout.lanes <= kMaxLanes && layout.line_bytes % kLineData == 0);
      for_sizes(int64_t{1} << 32, [&](int64_t bytes) {
        const Cut cut = Cut::make(layout, bytes);
        CHECK(cut.lanes >= 1 && cut.lanes <= layout.lanes);
        CHECK(cut.piece <= (cut.lines ? layout.line_bytes : layout.slot_bytes), cut.piece, " bytes a piece");
        int64_t pieces = 0;
        int ends = 0;
        for (int lane = 0; lane < cut.lanes; ++lane) {
          const int32_t count = cut.pieces_of(lane);
          CHECK(count >= 1 && (!cut.lines || count == 1), "lane ", lane, " of ", cut.lanes);
          pieces += count;
          const int64_t last = cut.begin(lane, count - 1);
          CHECK(cut.bytes_of(lane, count - 1) > 0 || bytes == 0);
          ends += last + cut.bytes_of(lane, count - 1) == bytes;
          for (int32_t i = 0; i < count - 1; ++i) {
            if (cut.bytes_of(lane, i) != cut.piece) CHECK(false, "a piece in the middle is short");
            if (i > 1000) break;
          }
        }
        CHECK(ends == 1, "one piece ends the message, found ", ends);
        CHECK(bytes == 0 || pieces == ceil_div(bytes, cut.piece));
        CHECK(cut.pieces_of(cut.lanes) == 0, "a lane that takes no part");
      });
    }
  }
}

TEST(tuning_channels_fit_into_the_workspace) {
  for (int world_size = 2; world_size <= kMaxWorldSize; ++world_size) {
    const WorkspaceLayout l = group_of(world_size).layout;
    const int64_t channels = int64_t{kChannelKinds} * (world_size - 1);
    CHECK(l.slot(channels, 0, 0) <= l.lines_offset && l.lines(channels, 0, 0) <= l.headers_offset);
    CHECK(l.header(channels, 0) <= l.posted_offset && l.posted(channels, 0) <= l.credit_offset);
    CHECK(l.credit(channels, 0) <= l.state_offset && l.state(true, channels, 0, world_size) <= l.control_offset);
    CHECK(l.channel_index(ChannelKind::kPointToPoint, 0, world_size - 1, world_size) == channels - 1);
    CHECK(l.total_bytes <= (64 << 20) + (1 << 20), "a group's memory stays what it was: ", l.total_bytes);
    CHECK(l.control_offset % kStageAlign == 0 && l.lines_offset % kStageAlign == 0);
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

TEST(tuning_what_was_measured_goes_before_the_table) {
  for (int64_t limit : {int64_t{0}, int64_t{4096}, int64_t{8} << 20}) {
    GroupShape group = group_of(2);
    group.oneshot_bytes = limit;
    for (int64_t bytes : {int64_t{4}, int64_t{4096}, int64_t{4100}, int64_t{8} << 20, int64_t{8} << 21}) {
      const bool oneshot = bytes <= limit;
      CHECK((choose_cpu_strategy(Strategy::kAuto, bytes, 2, limit) == Strategy::kOneShot) == oneshot);
      const bool has_room = bytes / 4 <= group.layout.oneshot_capacity(2, 4);
      const auto algorithm = choose_all_reduce(group, bytes / 4, Dtype::kFloat32, Strategy::kAuto).algorithm;
      CHECK((algorithm == Algorithm::kOneShotLamport) == (oneshot && has_room));
    }
  }
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
