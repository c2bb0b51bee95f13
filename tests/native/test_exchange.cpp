// The kernels `exchange` and `reduce`, their source run on a CPU (native/emulation), and what
// transport/cuda_launch.cpp makes of them, among ranks that are threads.
#include <algorithm>
#include <cstdlib>
#include <memory>

#include "kernels/kernels.h"
#include "native/emulation/group.h"
#include "native/harness.h"
#include "native/random_calls.h"
#include "protocol/failure_text.h"
#include "transport/cuda_launch.h"

namespace mnnvl::test {
namespace {

class Group : public EmulatedGroup {
 public:
  Group(int world_size, int64_t workspace_bytes, uint64_t timeout_ms = 10000)
      : EmulatedGroup(WorkspaceLayout::make(/*stage_bytes=*/1024, workspace_bytes, world_size), world_size,
                      /*fill=*/0x5a5a5a5au, timeout_ms) {}

  // As if every lane had carried so many messages and slots.
  void start_from(uint64_t messages, uint32_t slots) {
    const WorkspaceLayout& l = shape_.layout;
    const int64_t lanes = int64_t{kChannelKinds} * (shape_.world_size - 1) * kMaxLanes;
    for (auto& memory : memory_) {
      for (int64_t i = 0; i < lanes; ++i) {
        reinterpret_cast<uint32_t*>(memory.get() + l.posted_offset)[i] = slots;
        reinterpret_cast<uint64_t*>(memory.get() + l.credit_offset)[i] = uint64_t{slots} << 32 | uint32_t(messages);
        for (int64_t direction : {0, 1}) {
          reinterpret_cast<LaneState*>(memory.get() + l.state_offset)[direction * lanes + i] = {messages, slots, 0};
        }
      }
    }
  }

  void exchange(int rank, ChannelKind kind, const std::vector<kernels::ChannelMessage>& sends,
                const std::vector<kernels::ChannelMessage>& receives, int most_blocks = 8) const {
    kernels::ExchangeParams params;
    params.group = groups_[size_t(rank)];
    params.kind = kind;
    params.sends = sends.data();
    params.send_count = int(sends.size());
    params.receives = receives.data();
    params.receive_count = int(receives.size());
    params.send_shape = shape(sends, most_blocks);
    params.receive_shape = shape(receives, most_blocks);
    kernels::Launch launch;
    launch.threads = kernels::kMaxExchangeThreads;
    kernels::table().exchange.launch(params, launch);
  }

 private:
  // Few blocks, that several lanes meet in one, and any number of them.
  kernels::RoleShape shape(const std::vector<kernels::ChannelMessage>& messages, int most_blocks) const {
    std::vector<int> peers;
    int lanes = 1;
    for (const auto& m : messages) {
      lanes = std::max(lanes, int(Cut::make(shape_.layout.channel, m.bytes).lanes));
      if (std::find(peers.begin(), peers.end(), m.peer) == peers.end()) peers.push_back(m.peer);
    }
    const int all = int(peers.size()) * lanes;
    return {lanes, std::max(std::min(all, most_blocks), int(ceil_div(all, kMaxBlockLanes)))};
  }
};

struct Planned {
  int source, destination;
  int64_t bytes;
  int32_t tag;
  uint64_t seed;
};

kernels::ChannelMessage end_of(const Planned& m, void* data, int peer) {
  const Message message{data, m.bytes, peer, m.tag, Dtype::kUInt8};
  return {data, m.bytes, pack(descriptor_of(message)), m.tag, peer};
}

// This rank's part of `plan` in one launch, or its sends and its receives in one each at the same time.
void run_part(const Group& group, int rank, const std::vector<Planned>& plan, Random& random) {
  std::vector<Bytes> buffers(plan.size());
  std::vector<kernels::ChannelMessage> sends, receives;
  std::vector<std::pair<Planned, size_t>> expected;
  // Pairs in an order of this rank's own, the messages of each in that of the plan.
  const int64_t turn = random.below(97);
  const auto place = [&](const Planned& m) { return (m.source * 8 + m.destination + turn) * 31 % 97; };
  std::vector<Planned> ordered = plan;
  std::stable_sort(ordered.begin(), ordered.end(),
                   [&](const Planned& a, const Planned& b) { return place(a) < place(b); });
  const int64_t shift = random.below(2) == 0 ? 16 : random.below(20);  // packs want aligned memory
  for (size_t i = 0; i < ordered.size(); ++i) {
    const Planned& m = ordered[i];
    if (m.source == rank) {
      buffers[i] = Bytes(size_t(shift));
      const Bytes data = any_bytes(m.seed, m.bytes);
      buffers[i].insert(buffers[i].end(), data.begin(), data.end());
      sends.push_back(end_of(m, buffers[i].data() + shift, m.destination));
    } else if (m.destination == rank) {
      buffers[i].assign(size_t(m.bytes + shift + 16), std::byte{0x77});
      receives.push_back(end_of(m, buffers[i].data() + shift, m.source));
      expected.emplace_back(m, i);
    }
  }
  const int blocks = 1 + int(random.below(6));
  if (random.below(2) == 0) {
    group.exchange(rank, ChannelKind::kPointToPoint, sends, receives, blocks);
  } else {
    run_threads(2, [&](int incoming) {
      if (incoming == 0) group.exchange(rank, ChannelKind::kPointToPoint, sends, {}, blocks);
      if (incoming == 1) group.exchange(rank, ChannelKind::kPointToPoint, {}, receives, blocks);
    });
  }
  for (const auto& [m, i] : expected) {
    const Bytes data = any_bytes(m.seed, m.bytes);
    CHECK(std::equal(data.begin(), data.end(), buffers[i].begin() + shift), m.bytes, " bytes from ", m.source, " to ",
          m.destination);
    const auto untouched = [](std::byte b) { return b == std::byte{0x77}; };
    CHECK(std::all_of(buffers[i].begin(), buffers[i].begin() + shift, untouched), "written before it");
    CHECK(std::all_of(buffers[i].end() - 16, buffers[i].end(), untouched), "written behind it");
  }
}

TEST(exchange_random_lists) {
  constexpr int64_t kSizes[] = {0, 1, 8, 100, 1000, 4096, 5001, 70'001, 300'001};
  for (int world_size : {2, 3, 4, 5, 8}) {
    Group group(world_size, /*workspace_bytes=*/world_size * (int64_t{1} << 20));
    if (world_size % 2 == 0) group.start_from(0xfffffffeu, 0xfffffffdu);  // where 32 bits wrap
    for (int round = 0; round < iterations(3); ++round) {
      Random random(mix(uint64_t(world_size * 1000 + round)));
      std::vector<Planned> plan;
      for (int source = 0; source < world_size; ++source) {
        for (int destination = 0; destination < world_size; ++destination) {
          if (source == destination) continue;
          for (int64_t k = random.below(4); k > 0; --k) {
            plan.push_back(
                {source, destination, kSizes[random.below(std::size(kSizes))], int32_t(plan.size()), random.next()});
          }
        }
      }
      run_threads(world_size, [&](int rank) {
        Random own(mix(uint64_t(round * 100 + rank)));
        run_part(group, rank, plan, own);
        const FailureRecord& record = group.record(rank);
        CHECK(record.valid == 0, "world size ", world_size, ", round ", round, ": ", to_error(record, 0).what());
      });
    }
  }
}

// Even and uneven gathers, broadcasts from one rank and in two steps, barriers.
TEST(exchange_collectives) {
  constexpr int64_t kSizes[] = {1, 24, 1000, 5001, 70'001, (1 << 20) - 3, (1 << 20) + 5};
  for (int world_size : {2, 3, 4, 5, 8}) {
    const Group group(world_size, world_size * (int64_t{128} << 10));
    run_threads(world_size, [&](int rank) {
      for (int round = 0; round < iterations(3); ++round) {
        Random random(mix(uint64_t(world_size * 100 + round)));  // the same on every rank
        const int64_t bytes = kSizes[random.below(std::size(kSizes))];
        const uint64_t seed = random.next();
        if (random.below(2) == 0) {
          const int root = int(random.below(world_size));
          Bytes data = any_bytes(seed + uint64_t(rank), bytes);
          group.run(rank, BroadcastRequest{data.data(), bytes, root});
          CHECK(data == any_bytes(seed + uint64_t(root), bytes), "broadcast of ", bytes, " from ", root);
        } else {
          const bool even = random.below(2) == 0;
          std::vector<int64_t> sizes;
          for (int r = 0; r < world_size; ++r) sizes.push_back(even ? bytes / 4 : bytes / 4 * r);
          std::vector<Bytes> parts;
          std::vector<void*> outs;
          for (int64_t size : sizes) parts.emplace_back(size_t(size));
          for (Bytes& part : parts) outs.push_back(part.data());
          const Bytes mine = any_bytes(seed + uint64_t(rank), sizes[size_t(rank)]);
          AllGatherRequest request{mine.data(), outs.data(), sizes[0]};
          if (!even) request.sizes = sizes.data();
          group.run(rank, request);
          for (int r = 0; r < world_size; ++r) {
            CHECK(parts[size_t(r)] == any_bytes(seed + uint64_t(r), sizes[size_t(r)]), "gathered from ", r);
          }
        }
        group.run(rank, BarrierRequest{});
        CHECK(group.record(rank).valid == 0, to_error(group.record(rank), 0).what());
      }
    });
  }
}

struct GroupRank {
  const Group& group;
  const int index;
  int rank() const { return index; }
  void run(const Request& request) {
    // Float sums are the Lamport kernels', which don't run here.
    const auto* sum = std::get_if<AllReduceRequest>(&request);
    if (sum != nullptr && is_float_sum(sum->dtype, sum->op)) {
      group.run(index, ReduceRequest{sum->in, sum->out, sum->numel, 0, sum->dtype, sum->op});
      return group.run(index, BroadcastRequest{sum->out, sum->numel * element_size(sum->dtype), 0});
    }
    // So are the even ones of its halves.
    if (const auto* part = std::get_if<ReduceScatterRequest>(&request); part != nullptr && part->numels == nullptr) {
      const std::vector<int64_t> numels(size_t(group.world_size()), part->numel);
      ReduceScatterRequest uneven = *part;
      uneven.numels = numels.data();
      return group.run(index, uneven);
    }
    group.run(index, request);
  }
};

// Through lines and through slots, many pieces a lane. The largest channels are a process group's of two ranks: with
// more slots, and several pieces posted at a time.
TEST(exchange_random_calls) {
  for (int world_size : {2, 3, 4, 5, 8}) {
    for (int64_t channel_bytes : {int64_t{16} << 10, int64_t{256} << 10, int64_t{8} << 20}) {
      const bool large = channel_bytes > 1 << 20;
      if (large && world_size > 3) continue;
      Group group(world_size, kChannelKinds * (world_size - 1) * channel_bytes);
      if (world_size == 2) group.start_from(0xfffffffeu, 0xfffffffdu);
      run_threads(world_size, [&](int index) {
        GroupRank rank{group, index};
        for (int i = 0; i < iterations(6); ++i) {
          const Call call{world_size, uint64_t(i + world_size * 100), /*most_bytes=*/large ? 12'000'000 : 200'000};
          check_any(rank, call);
          if (large) check_reduce(rank, call);
          const FailureRecord& record = group.record(index);
          CHECK(record.valid == 0, "world size ", world_size, ", call ", i, ": ", to_error(record, 0).what());
        }
      });
    }
  }
}

std::vector<Bytes> of_bytes(std::initializer_list<int64_t> sizes) {
  std::vector<Bytes> all;
  for (int64_t bytes : sizes) all.emplace_back(size_t(bytes));
  return all;
}

kernels::ChannelMessage end_of(const CallDescriptor& call, Bytes& data, int peer) {
  return {data.data(), int64_t(data.size()), pack(call), call.tag, peer};
}

// The receiver finds out, and says what both ends have; whoever waits for it is told.
TEST(exchange_ends_that_differ) {
  constexpr int64_t kSizes[] = {0, 192, 400, 3000, 300'000};
  for (int64_t sent : kSizes) {
    for (int64_t expected : kSizes) {
      const Group group(2, int64_t{2} << 20);
      std::vector<Bytes> data = of_bytes({sent, expected, sent});
      const CallDescriptor theirs{Operation::kAllGather, sent}, mine{Operation::kBroadcast, expected, 1};
      run_threads(2, [&](int rank) {
        if (rank == 0) {
          group.exchange(0, ChannelKind::kCollective, {end_of(theirs, data[0], 1)}, {end_of(theirs, data[2], 1)});
        } else {
          group.exchange(1, ChannelKind::kCollective, {}, {end_of(mine, data[1], 0)});
        }
      });
      const FailureRecord& found = group.record(1);
      CHECK(found.valid == 1 && found.cause == FailureCause::kMismatch && found.peer == 0, sent, ", ", expected);
      CHECK(found.calls.mine == pack(mine) && found.calls.theirs == pack(theirs));
      CHECK(group.record(0).valid == 1 && group.record(0).cause == FailureCause::kPeerFailed);
      CHECK(abort_cause(group.record(0).told) == FailureCause::kMismatch && abort_finder(group.record(0).told) == 1);
    }
  }
}

TEST(exchange_tags_that_differ) {
  const Group group(2, int64_t{2} << 20);
  std::vector<Bytes> data = of_bytes({100, 100});
  run_threads(2, [&](int rank) {
    CallDescriptor call = descriptor_of(Message{nullptr, 100, 1 - rank, 5 + rank, Dtype::kUInt8});
    const std::vector<kernels::ChannelMessage> one{end_of(call, data[size_t(rank)], 1 - rank)};
    if (rank == 0) group.exchange(0, ChannelKind::kPointToPoint, one, {});
    if (rank == 1) group.exchange(1, ChannelKind::kPointToPoint, {}, one);
  });
  CHECK(group.record(1).cause == FailureCause::kMismatch);
  CHECK(group.record(1).calls.my_tag == 6 && group.record(1).calls.their_tag == 5);
}

// A reduction's watchers find out too, and nobody stays behind: through lines and through slots.
TEST(exchange_reductions_that_fail) {
  const auto reduce = [](const Group& group, int rank, Bytes& data, int64_t numel, ReduceOp op) {
    group.run(rank, ReduceRequest{data.data(), data.data(), numel, /*root=*/0, Dtype::kInt32, op});
  };
  for (int64_t numel : {100, 100'000}) {
    const Group group(3, int64_t{2} << 20);
    run_threads(3, [&](int rank) {
      Bytes data(static_cast<size_t>(numel * 4));
      reduce(group, rank, data, numel, rank == 2 ? ReduceOp::kMin : ReduceOp::kMax);
    });
    const FailureRecord& found = group.record(0);
    CHECK(found.valid == 1 && found.cause == FailureCause::kMismatch && found.peer == 2, numel);
    CHECK(unpack(found.calls.mine).op == ReduceOp::kMax && unpack(found.calls.theirs).op == ReduceOp::kMin);

    // Of two ranks: of more, a loaded machine may keep one that comes from coming in time.
    const Group late(2, int64_t{2} << 20, /*timeout_ms=*/300);
    Bytes data(static_cast<size_t>(numel * 4));
    reduce(late, 0, data, numel, ReduceOp::kMax);
    CHECK(late.record(0).cause == FailureCause::kDeadline && late.record(0).peer == 1, numel);
    CHECK(late.record(0).operation == Operation::kReduce && late.record(0).stage == kStageMessage);
    reduce(late, 1, data, numel, ReduceOp::kMax);
    CHECK(late.record(1).valid == 1 && late.record(1).cause == FailureCause::kPeerFailed, "told at its start");
  }
}

// One for all and all for one, at the wrap.
TEST(exchange_of_72_ranks) {
  constexpr int kWorld = kMaxWorldSize;
  Group group(kWorld, int64_t{kChannelKinds} * (kWorld - 1) * (4 << 10));
  group.start_from(0xfffffffeu, 0xfffffffdu);
  run_threads(kWorld, [&](int index) {
    GroupRank rank{group, index};
    const Call call{kWorld, /*call=*/1, /*most_bytes=*/500};
    check_scatter(rank, call);
    check_gather(rank, call);
    const FailureRecord& record = group.record(index);
    CHECK(record.valid == 0, to_error(record, 0).what());
  });
}

// More peers than a warp has threads.
TEST(exchange_reductions_of_many_ranks) {
  constexpr int kWorld = 35;
  const Group group(kWorld, int64_t{2} * (kWorld - 1) * (16 << 10));
  for (int64_t numel : {11, 9'001}) {
    run_threads(kWorld, [&](int rank) {
      std::vector<int32_t> data(static_cast<size_t>(numel), rank);
      group.run(rank, ReduceRequest{data.data(), data.data(), numel, /*root=*/34, Dtype::kInt32, ReduceOp::kSum});
      const int32_t expected = rank == 34 ? kWorld * (kWorld - 1) / 2 : rank;
      for (int32_t value : data) CHECK(value == expected, value, " at ", rank);
    });
  }
}

// Nobody comes: a source out of room and a destination without data both end, and say whom they waited for.
TEST(exchange_ends_at_the_deadline) {
  for (int64_t bytes : {int64_t{100}, int64_t{8} << 20}) {
    const Group group(3, int64_t{1} << 20, /*timeout_ms=*/200);
    Bytes data(static_cast<size_t>(bytes));
    const CallDescriptor call{Operation::kSend, bytes};
    group.exchange(0, ChannelKind::kPointToPoint, {}, {end_of(call, data, 2)});
    CHECK(group.record(0).cause == FailureCause::kDeadline && group.record(0).peer == 2);
    CHECK(group.record(0).operation == Operation::kRecv && group.record(0).stage == kStageMessage);
    if (bytes == 100) continue;
    group.exchange(1, ChannelKind::kPointToPoint, {end_of(call, data, 2)}, {});
    CHECK(group.record(1).valid == 1 && group.record(1).cause == FailureCause::kPeerFailed, "told at its start");
  }
  const Group group(2, int64_t{1} << 20, /*timeout_ms=*/200);
  Bytes data(size_t{8} << 20);
  group.exchange(1, ChannelKind::kPointToPoint, {end_of({Operation::kSend, 8 << 20}, data, 0)}, {});
  CHECK(group.record(1).cause == FailureCause::kDeadline && group.record(1).stage == kStageCredit);
}

// A second kernel on the same direction of a channel is found out.
TEST(exchange_two_at_once) {
  const Group group(2, int64_t{1} << 20);
  std::vector<Bytes> data = of_bytes({100, 100});
  const CallDescriptor call{Operation::kSend, 100};
  run_threads(2, [&](int i) {
    if (i == 1) std::this_thread::sleep_for(std::chrono::milliseconds(200));
    group.exchange(0, ChannelKind::kPointToPoint, {}, {end_of(call, data[size_t(i)], 1)});
  });
  CHECK(group.record(0).cause == FailureCause::kConcurrent && group.record(0).peer == 1);
}

}  // namespace
}  // namespace mnnvl::test
