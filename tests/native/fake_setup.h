// Runs the real set-up code over simulated drivers, from plain data to plain data: what tests call
// on machines that can't do the real thing.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <tuple>
#include <vector>

namespace mnnvl {

struct FakeSetupConfig {
  int world_size = 2;
  int64_t bytes = 100000;
  int timeout_ms = 4000;
  int repeats = 1;  // whole set-ups and tear-downs, one after another; stops after one that fails
  int sleeps = 0;  // of a buffer that works: detach() and attach(), so many times; a failed one is tried once more
  std::string bootstrap = "store";  // "nccl" (a simulated one, between threads only) or "auto"
  std::vector<int> multicast_off_ranks;  // ranks whose options switch multicast off

  // Per rank. Empty: the default for all; one value: for all; else world_size values.
  std::vector<std::string> host_ids;  // "": found out
  std::vector<int> devices;  // equal numbers are one device; default: the rank
  std::vector<int> compute_capabilities;  // 90
  std::vector<int> multiprocessors;  // 132
  std::vector<std::string> device_names;  // "Simulated GPU"; one with " MIG " maps no other device's memory
  std::vector<std::string> nvml_problems;  // why NVML can't tell of a fabric; "": it can
  std::vector<int> fd_handles;  // 1
  std::vector<std::string>
      fabric_handles;  // "yes", "no" (says the attribute) or "not_permitted" (says only the driver)
  std::vector<std::string> clusters;  // fabric cluster by name; "": a zero uuid (the default)
  std::vector<int> cliques;  // 0
  std::vector<int> multicast_support;  // 1
  std::vector<std::string> multicast_forbidden;  // SymmetricBufferOptions'; ""

  std::vector<std::tuple<int, std::string, int, int>>
      faults;  // rank, function ("cuMemMap"), nth call from 1, code (0: gives null)
  std::vector<std::tuple<int, int, std::string>> corruptions;  // mapping rank, owner, "lost" or "misrouted"
  int multicast_lost_rank = -1;  // multicast stores don't reach it

  // With a directory, this process is rank `rank` alone and meets the others through files there; else ranks are
  // threads.
  std::string directory;
  int rank = 0;
};

// Vectors are by rank: world_size entries, or one when this process is one rank.
struct FakeSetupResult {
  std::vector<bool> ok;
  std::vector<std::string> errors;  // empty when ok
  std::vector<std::string>
      error_kinds;  // "unsupported", "system", "timeout", "peer_failed", "invalid_argument", "aborted"
  std::vector<double> seconds;  // until the set-up returned or threw, of the last repeat
  std::vector<bool> verified;  // everything at rest afterwards, and stores through every mapping arrive (own check)
  std::vector<std::string> handle_types;  // "fabric", "fd", or "" on error
  std::vector<bool> multicast;
  std::vector<std::string> multicast_problems;
  std::vector<std::vector<int>> peer_pids;
  std::vector<int> min_multiprocessors;
  std::vector<int64_t> bytes;
  std::vector<bool> addresses_kept;  // through all sleeps
  std::vector<std::string> sleep_errors;  // of the first detach() or attach() that failed
  // What all ranks' drivers hold while all are detached, at the last such time.
  std::map<std::string, int64_t> asleep;

  std::map<std::string, int64_t> leaks;  // live driver objects after tear-down, by kind
  int descriptors_leaked = 0;  // /proc/self/fd, after less before
  int mappings_leaked = 0;  // shared mappings in /proc/self/maps, after less before
  std::map<std::string, int64_t> calls;  // by function, all ranks together
  std::vector<std::map<std::string, int64_t>> calls_by_rank;
};

// SymmetricBuffer::create on every rank. Throws only for a malformed config.
FakeSetupResult run_fake_setup(const FakeSetupConfig& config);

// The descriptor flags (F_GETFD) of an exported allocation.
int exported_descriptor_flags();

// HostSegments::create on every rank; of the config: world_size, bytes, timeout_ms, repeats, host_ids, directory and
// rank.
FakeSetupResult run_host_setup(const FakeSetupConfig& config);

// FdChannel::exchange between threads, rank 1 misbehaving: "well" (it does not), "absent" (its socket is closed at
// once), "silent" (it never takes part), "strangers" (others connect to every rank and send rubbish and descriptors),
// "none" (it passes no descriptor).
FakeSetupResult run_descriptor_exchange(int world_size, const std::string& scenario, int timeout_ms);

}  // namespace mnnvl
