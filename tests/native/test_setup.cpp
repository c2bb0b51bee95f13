// The set-up over the test double, for the sanitizers: every kind of plan, every driver call failing once, descriptors
// with good and bad company. What errors say is tested from Python.
#include "bootstrap/host_identity.h"
#include "native/setup_checks.h"

namespace mnnvl::test {
namespace {

FakeSetupConfig rack(const std::string& bootstrap) {
  FakeSetupConfig config;
  config.world_size = 3;
  config.clusters = {"rack"};
  config.bootstrap = bootstrap;
  config.timeout_ms = 20000;
  return config;
}

FakeSetupConfig one_host() {
  FakeSetupConfig config;
  config.world_size = 3;
  config.fabric_handles = {"not_permitted"};
  config.timeout_ms = 20000;
  return config;
}

TEST(setup_every_plan) {
  FakeSetupConfig repeated = one_host();
  repeated.repeats = iterations(5);
  check_works(run_fake_setup(repeated), "descriptors");
  for (const char* bootstrap : {"store", "nccl", "auto"}) check_works(run_fake_setup(rack(bootstrap)), bootstrap);
  FakeSetupConfig plain = one_host();
  plain.multicast_support = {0};
  check_works(run_fake_setup(plain), "no multicast");
  FakeSetupConfig large = one_host();
  large.world_size = 8;
  check_works(run_fake_setup(large), "8 ranks");
}

// Each function's first call on rank 1 fails: nothing is left behind, whether the set-up goes on without or not.
TEST(setup_survives_every_failing_call) {
  for (const FakeSetupConfig& good : {one_host(), rack("nccl")}) {
    const FakeSetupResult well = run_fake_setup(good);
    check_works(well, "well");
    for (const auto& [function, count] : well.calls_by_rank[1]) {
      FakeSetupConfig config = good;
      config.faults = {{1, function, 1, 999}};
      const FakeSetupResult result = run_fake_setup(config);
      check_clean(result, function);
      for (bool ok : result.ok) CHECK(ok == result.ok[0], function, ": the ranks disagree");
      CHECK(result.errors[0] == result.errors[2], function);
    }
  }
}

// While it sleeps nobody holds anything but addresses: one for each rank's memory, one for multicast.
void check_asleep(const FakeSetupResult& result, int world_size, bool multicast, const std::string& what) {
  const int64_t ranges = world_size * (world_size + (multicast ? 1 : 0));
  const std::map<std::string, int64_t> expected{{"reservations", ranges}};
  for (const auto& [kind, count] : result.asleep) CHECK(expected.count(kind), what, ": ", count, " ", kind);
  CHECK(result.asleep == expected, what);
}

void check_awake(const FakeSetupResult& result, const std::string& what) {
  check_works(result, what);
  for (bool kept : result.addresses_kept) CHECK(kept, what);
  for (const std::string& error : result.sleep_errors) CHECK(error == result.sleep_errors[0], what, ": ", error);
}

TEST(sleep_of_every_plan) {
  FakeSetupConfig plain = one_host();
  plain.multicast_support = {0};
  FakeSetupConfig alone = one_host();
  alone.world_size = 1;
  for (FakeSetupConfig config : {one_host(), rack("store"), rack("nccl"), plain, alone}) {
    config.sleeps = iterations(3);
    const FakeSetupResult result = run_fake_setup(config);
    check_awake(result, "every plan");
    CHECK(result.sleep_errors[0].empty(), result.sleep_errors[0]);
    const bool multicast = config.world_size > 1 && config.multicast_support.empty();
    CHECK(result.multicast[0] == multicast);
    check_asleep(result, config.world_size, multicast, "every plan");
  }
}

// Every driver call of a sleep fails once on rank 1: all ranks raise the same, hold nothing but addresses, and the
// second try succeeds at the old addresses, with multicast as before.
TEST(sleep_survives_every_failing_call) {
  for (const FakeSetupConfig& good : {one_host(), rack("nccl")}) {
    FakeSetupConfig sleeping = good;
    sleeping.sleeps = 1;
    const FakeSetupResult awake = run_fake_setup(good), well = run_fake_setup(sleeping);
    check_awake(well, "well");
    for (const auto& [function, count] : well.calls_by_rank[1]) {
      const auto before = awake.calls_by_rank[1].find(function);
      const int64_t first = before == awake.calls_by_rank[1].end() ? 0 : before->second;
      for (int64_t nth = 1; nth <= count; ++nth) {
        // Of the releasing functions the first calls are the sleep's, and the last ones the tear-down's.
        const bool releases = function == "cuMemUnmap" || function == "cuMemRelease" || function == "cuMulticastUnbind";
        if (!releases && nth <= first) continue;
        FakeSetupConfig config = sleeping;
        config.faults = {{1, function, static_cast<int>(nth), 999}};
        const FakeSetupResult result = run_fake_setup(config);
        const std::string what = function + " " + std::to_string(nth);
        check_awake(result, what);
        check_asleep(result, config.world_size, /*multicast=*/true, what);
        CHECK(result.multicast[0], what);
        const bool heard = !result.sleep_errors[0].empty();
        if (function == "cuMemCreate" || function == "cuMemMap" || function == "cuMulticastBindMem") CHECK(heard, what);
      }
    }
  }
}

TEST(setup_finds_a_wrong_mapping) {
  FakeSetupConfig config = one_host();
  config.corruptions = {{0, 2, "lost"}};
  const FakeSetupResult result = run_fake_setup(config);
  check_clean(result, "lost");
  for (bool ok : result.ok) CHECK(!ok);
}

TEST(setup_of_host_segments) {
  FakeSetupConfig config;
  config.world_size = 4;
  config.bytes = 123457;
  config.repeats = 3;
  config.timeout_ms = 20000;
  check_works(run_host_setup(config), "segments");
}

TEST(setup_watches_processes_of_known_hosts_alone) {
  HostIdentity self = host_identity("h"), peer = self;
  peer.pid = self.pid + 1;
  const auto watched = [&] { return visible_pids({self, peer}, 0)[1]; };
  CHECK(watched() == peer.pid);
  self.boot_id = peer.boot_id = "";  // out of descriptors, perhaps on two hosts
  CHECK(watched() == -1);
  self = host_identity("h");
  peer.boot_id = self.boot_id;
  self.pid_namespace = peer.pid_namespace = "?";
  CHECK(watched() == -1);
}

TEST(setup_descriptors) {
  check_works(run_descriptor_exchange(4, "well", 20000), "well");
  check_works(run_descriptor_exchange(12, "well", 20000), "well, 12");
  check_works(run_descriptor_exchange(3, "none", 20000), "none");
  check_works(run_descriptor_exchange(3, "strangers", 20000), "strangers");
}

TEST(setup_descriptors_of_a_peer_that_fails) {
  for (const char* scenario : {"absent", "silent"}) {
    const FakeSetupResult result = run_descriptor_exchange(3, scenario, 300);
    check_clean(result, scenario);
    CHECK(!result.ok[0] && !result.ok[2], scenario);
    // The second to notice may see the first one leave.
    const std::string texts = result.errors[0] + " | " + result.errors[2];
    CHECK(texts.find("rank 1") != std::string::npos || texts.find("rank(s) 1") != std::string::npos, texts);
  }
}

}  // namespace
}  // namespace mnnvl::test
