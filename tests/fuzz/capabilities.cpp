// What the ranks' devices can do, the plan that follows, and the processes that are watched.
#include "memory/capabilities.h"

#include "common/math.h"
#include "fuzz/fuzz.h"
#include "system/peer_watch.h"

namespace mnnvl {
namespace {

Capabilities honest() {
  Capabilities one;
  one.host = host_identity("");
  one.device_uuid = "GPU-0";
  one.multiprocessors = 132;
  one.granularity = 1 << 21;
  one.bytes = 1 << 26;
  one.fabric_problem = one.cluster_problem = "none here";
  return one;
}

// The record of a rank: bytes of the fuzzer's, or an honest one with some of them.
std::string record(fuzz::Input& input) {
  if (input.below(2) == 0) return input.chunk();
  Capabilities one = honest();
  for (int field = input.below(16); field != 0; field = input.below(16)) {
    switch (field) {
      case 1: one.host.host_id = input.chunk(); break;
      case 2: one.host.pid = input.byte() - 2; break;
      case 3: one.granularity = uint64_t{input.byte()} << input.below(64); break;
      case 4: one.device_uuid = input.chunk(); break;
      case 5: one.multicast_forbidden = input.chunk(); break;
      case 6: one.cluster_uuid = input.chunk(); break;
      case 7: one.cluster_problem = input.chunk(); break;
      case 8: one.fd_problem = input.chunk(); break;
      case 9: one.fabric_problem = input.chunk(); break;
      case 10: one.bootstrap = static_cast<Bootstrap>(input.byte() - 2); break;
      case 11: one.has_nccl = true; break;
      case 12: one.multiprocessors = input.byte() - 2; break;
      default: one.bytes = input.byte(); break;
    }
  }
  return one.serialise();
}

}  // namespace
}  // namespace mnnvl

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace mnnvl;
  fuzz::Input input(data, size);
  fuzz::only_errors([&] {
    std::vector<Capabilities> ranks{Capabilities::parse(honest().serialise(), 0)};
    std::vector<HostIdentity> hosts{ranks[0].host};
    const int others = 1 + input.below(4);
    for (int rank = 1; rank <= others; ++rank) {
      ranks.push_back(Capabilities::parse(record(input), rank));
      hosts.push_back(ranks.back().host);
    }
    for (int pid : visible_pids(hosts, 0)) (void)PeerWatch(pid).ended();
    const Plan plan = choose_plan(ranks);
    const int64_t bytes = align_up(static_cast<int64_t>(ranks[0].bytes), static_cast<int64_t>(plan.granularity));
    REQUIRE(bytes >= static_cast<int64_t>(ranks[0].bytes), bytes);
    REQUIRE(plan.bootstrap != Bootstrap::kAuto);
    REQUIRE(plan.min_multiprocessors >= 1);
  });
  return 0;
}
