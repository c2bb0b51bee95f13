// The set-up over the test double, for the sanitizers: every kind of plan, every driver call failing once, descriptors
// with good and bad company. What errors say is tested from Python.
#include "native/fake_setup.h"
#include "native/harness.h"

namespace mnnvl::test {
namespace {

void check_clean(const FakeSetupResult& result, const std::string& what) {
  for (const auto& [kind, count] : result.leaks) CHECK(count == 0, what, ": ", count, " ", kind);
  CHECK(result.descriptors_leaked == 0, what, ": ", result.descriptors_leaked);
  CHECK(result.mappings_leaked == 0, what, ": ", result.mappings_leaked);
}

void check_works(const FakeSetupResult& result, const std::string& what) {
  check_clean(result, what);
  for (size_t rank = 0; rank < result.ok.size(); ++rank) {
    CHECK(result.ok[rank], what, ": ", result.errors[rank]);
    CHECK(result.verified[rank], what, ": rank ", rank);
  }
}

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
