// As many ranks as there can be, those of a whole rack: the set-up over the double, host segments, and the CPU
// communicator, ranks being threads. What counts ranks in something narrow, or adds deadlines up over them, shows here.
#include <sys/resource.h>

#include <algorithm>

#include "native/message_exchange.h"
#include "native/random_calls.h"
#include "native/setup_checks.h"
#include "protocol/types.h"

namespace mnnvl::test {
namespace {

constexpr int kWorld = kMaxWorldSize, kTray = 4, kLast = kWorld - 1;

// Passing descriptors takes three for each pair, all of them in this process.
void allow_descriptors() {
  rlimit files{};
  getrlimit(RLIMIT_NOFILE, &files);
  files.rlim_cur = files.rlim_max;
  setrlimit(RLIMIT_NOFILE, &files);
}

FakeSetupConfig rack(const std::string& bootstrap = "store") {
  FakeSetupConfig config;
  config.world_size = kWorld;
  config.clusters = {"rack"};
  config.bootstrap = bootstrap;
  config.timeout_ms = 60000;
  for (int rank = 0; rank < kWorld; ++rank) config.host_ids.push_back("tray" + std::to_string(rank / kTray));
  return config;
}

FakeSetupConfig one_host() {
  allow_descriptors();
  FakeSetupConfig config = rack();
  config.host_ids.clear();
  config.fabric_handles = {"not_permitted"};
  return config;
}

// No rank's work grows with more than the number of ranks.
void check_calls(const FakeSetupResult& result) {
  for (const auto& calls : result.calls_by_rank) {
    CHECK(calls.at("cuMemMap") == kWorld + 1, calls.at("cuMemMap"));  // every rank's memory, and multicast
    CHECK(calls.at("cuMemCreate") <= 3 && calls.at("cuMemImportFromShareableHandle") <= kWorld);
  }
}

TEST(world_72_setup_of_a_rack) {
  const FakeSetupResult result = run_fake_setup(rack());
  check_works(result, "rack");
  check_calls(result);
  for (int rank = 0; rank < kWorld; ++rank) CHECK(result.handle_types[rank] == "fabric" && result.multicast[rank]);
}

// And where one rank's multicast fails, all go on without.
TEST(world_72_setup_of_a_rack_over_nccl) {
  FakeSetupConfig config = rack("nccl");
  config.faults = {{kLast, "cuMulticastBindMem", 1, 2}};
  const FakeSetupResult result = run_fake_setup(config);
  check_works(result, "without multicast");
  const std::string& problem = result.multicast_problems[0];
  CHECK(problem.find("failed on rank 71 (") != std::string::npos, problem);
  for (int rank = 0; rank < kWorld; ++rank) CHECK(result.handle_types[rank] == "fabric" && !result.multicast[rank]);
}

TEST(world_72_setup_of_one_host) {
  const FakeSetupResult result = run_fake_setup(one_host());
  check_works(result, "descriptors");
  check_calls(result);
  for (int rank = 0; rank < kWorld; ++rank) CHECK(result.handle_types[rank] == "fd" && result.multicast[rank]);
}

// The last rank's call, for its last peer where it is for one, in each stage.
TEST(world_72_setup_fails_alike) {
  for (const auto& [function, nth] : {std::pair{"cuDeviceGetUuid", 1}, {"cuMemImportFromShareableHandle", kLast}}) {
    FakeSetupConfig config = rack();
    config.faults = {{kLast, function, nth, 999}};
    check_fails_alike(run_fake_setup(config), kLast, function);
  }
  FakeSetupConfig nccl = rack("nccl");
  nccl.faults = {{kLast, "ncclAllGather", 1, 2}};
  check_fails_alike(run_fake_setup(nccl), kLast, "ncclAllGather");
  FakeSetupConfig descriptors = one_host();
  descriptors.faults = {{kLast, "cuMemMap", kWorld, 2}};
  check_fails_alike(run_fake_setup(descriptors), kLast, "cuMemMap");
  FakeSetupConfig misrouted = rack();
  misrouted.corruptions = {{kLast, kLast - 1, "lost"}};
  check_fails_alike(run_fake_setup(misrouted), kLast - 1, "self-test");
}

TEST(world_72_host_segments) {
  FakeSetupConfig config;
  config.world_size = kWorld;
  config.bytes = 123457;
  config.timeout_ms = 60000;
  check_works(run_host_setup(config), "segments");
}

// Every collective in the least slots, over the wrap of the counters; every byte against the definition.
TEST(world_72_collectives) {
  Segments segments(kWorld, cpu::least_slot_bytes(kWorld));
  segments.start_from(0xffffff00u);
  run_group(segments, [](CpuRank& rank) {
    for (int turn = 0; turn < iterations(2); ++turn) {
      const Call call{kWorld, static_cast<uint64_t>(turn), /*most_bytes=*/6000};
      check_all_reduce(rank, call, Strategy::kOneShot);
      check_all_reduce(rank, call, Strategy::kTwoShot);
      check_reduce(rank, call);
      check_reduce_scatter(rank, call);
      check_all_gather(rank, call);
      check_broadcast(rank, call);
      check_gather(rank, call);
      check_scatter(rank, call);
      check_all_to_all(rank, call);
      rank.barrier();
    }
  });
}

// Each rank sends to all before it receives from all, from the last to the first; then rank 0 takes from anybody.
TEST(world_72_messages) {
  const Segments segments(kWorld, cpu::least_slot_bytes(kWorld));
  const auto id = [](int from, int to) { return static_cast<uint64_t>(from * 100 + to); };
  run_group(segments, [&](CpuRank& rank) {
    const int me = rank.rank();
    std::vector<std::unique_ptr<Exchange>> all;
    for (int to = 0; to < kWorld; ++to) {
      if (to != me) all.push_back(isend(rank, id(me, to), 10 * to, to));
    }
    for (int from = kLast; from >= 0; --from) {
      if (from != me) all.push_back(irecv(rank, id(from, me), 10 * me, from));
    }
    for (const auto& exchange : all) exchange->wait();
    if (me != 0) return isend(rank, id(me, 0), 100, 0, /*tag=*/1)->wait();
    std::vector<bool> heard(kWorld);
    for (int i = 1; i < kWorld; ++i) {
      const auto any = irecv(rank, Exchange::kUnknown, 100, Message::kAnySource, /*tag=*/1);
      any->wait();
      any->expect(0, id(any->source(), 0));
      any->check();
      CHECK(!heard[static_cast<size_t>(any->source())], any->source(), " twice");
      heard[static_cast<size_t>(any->source())] = true;
    }
  });
}

// The first to give up names the last rank, and the others hear of it: no deadline is waited for twice.
TEST(world_72_a_late_rank_is_named) {
  const Segments segments(kWorld, cpu::least_slot_bytes(kWorld));
  run_group(segments, [](CpuRank& rank) {
    rank.barrier();
    if (rank.rank() == kLast) return;
    const Error error = error_of([&] { rank.run(BarrierRequest{}, rank.rank() == 40 ? 500 : kLongMs); });
    const std::string text = error.what();
    if (rank.rank() == 40)
      CHECK(error.kind() == ErrorKind::kTimeout && text.find("rank 71") != std::string::npos, text);
    if (rank.rank() != 40)
      CHECK(error.kind() == ErrorKind::kPeerFailed && text.find("rank 40") != std::string::npos, text);
  });
}

}  // namespace
}  // namespace mnnvl::test
