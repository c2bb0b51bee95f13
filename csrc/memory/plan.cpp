// The comparison of capabilities. Everything here depends on the exchanged records alone, so that all ranks conclude
// the same.
#include <algorithm>
#include <map>
#include <set>
#include <utility>

#include "memory/capabilities.h"

namespace mnnvl {
namespace {

using Ranks = std::vector<Capabilities>;

int first_rank(const Ranks& ranks, bool (*test)(const Capabilities&)) {
  for (size_t rank = 0; rank < ranks.size(); ++rank) {
    if (test(ranks[rank])) return static_cast<int>(rank);
  }
  return -1;
}

std::vector<HostIdentity> hosts(const Ranks& ranks) {
  std::vector<HostIdentity> identities;
  for (const Capabilities& c : ranks) identities.push_back(c.host);
  return identities;
}

int count_cliques(const Ranks& ranks) {
  std::set<std::pair<std::string, uint32_t>> cliques;
  for (const Capabilities& c : ranks) cliques.emplace(c.cluster_uuid, c.clique);
  return static_cast<int>(cliques.size());
}

std::string table(const Ranks& ranks) {
  std::string rows;
  for (size_t rank = 0; rank < ranks.size(); ++rank) {
    const Capabilities& c = ranks[rank];
    std::string fabric = c.cluster_uuid.empty() ? str("none (", c.cluster_problem, ")")
                                                : str("cluster ", c.cluster_uuid, " clique ", c.clique);
    auto handle = [](const std::string& problem) {
      return problem.empty() ? std::string("yes") : str("no (", problem, ")");
    };
    rows += str("\n  rank ", rank, ": ", c.where(), " [host id ", c.host.host_id, "]; fabric: ", fabric,
                "; fabric handles: ", handle(c.fabric_problem), "; fd handles: ", handle(c.fd_problem));
  }
  return rows;
}

// Why fabric handles don't serve all ranks, empty when they do.
std::string fabric_obstacle(const Ranks& ranks) {
  int rank = first_rank(ranks, [](const Capabilities& c) { return !c.fabric_problem.empty(); });
  if (rank >= 0) return str("rank ", rank, " can't export fabric handles: ", ranks[rank].fabric_problem);
  rank = first_rank(ranks, [](const Capabilities& c) { return c.cluster_uuid.empty(); });
  if (rank >= 0) return str("rank ", rank, "'s device is in no NVLink fabric cluster: ", ranks[rank].cluster_problem);
  int cliques = count_cliques(ranks);
  return cliques > 1 ? str("the devices are in ", cliques, " different NVLink cliques") : "";
}

// Why file descriptors don't serve all ranks, empty when they do.
std::string fd_obstacle(const Ranks& ranks) {
  int host_count = count_hosts(hosts(ranks));
  if (host_count > 1) {
    return str("the ranks are on ", host_count,
               " hosts (containers with a network of their own count as hosts), and descriptors stay on one");
  }
  int rank = first_rank(ranks, [](const Capabilities& c) { return !c.fd_problem.empty(); });
  return rank >= 0 ? str("rank ", rank, " can't export descriptors: ", ranks[rank].fd_problem) : "";
}

// Two ranks on one device, as "ranks 0 and 2 share device …"; empty when there are none.
std::string shared_device(const Ranks& ranks) {
  std::map<std::pair<std::string, std::string>, size_t> seen;
  for (size_t rank = 0; rank < ranks.size(); ++rank) {
    const Capabilities& c = ranks[rank];
    auto [at, fresh] = seen.emplace(std::make_pair(c.host.host_id, c.device_uuid), rank);
    if (!fresh) return str("ranks ", at->second, " and ", rank, " share one device (", c.where(), ")");
  }
  return "";
}

std::string multicast_obstacle(const Ranks& ranks) {
  if (ranks.size() == 1) return "there is one rank";
  int rank = first_rank(ranks, [](const Capabilities& c) { return !c.multicast_problem.empty(); });
  return rank >= 0 ? str("rank ", rank, ": ", ranks[rank].multicast_problem) : shared_device(ranks);
}

// CUDA names an instance "NVIDIA H200 MIG 1g.18gb". It isn't refused: whether memory can be mapped, the driver says.
std::string mapping_hint(const Ranks& ranks) {
  const int rank =
      first_rank(ranks, [](const Capabilities& c) { return c.device_name.find(" MIG ") != std::string::npos; });
  return rank < 0 ? ""
                  : str(" (rank ", rank,
                        "'s device is a MIG instance, which shares memory with no other device: give "
                        "the ranks whole GPUs, or all the same instance)");
}

void check_same_request(const Ranks& ranks) {
  for (size_t rank = 1; rank < ranks.size(); ++rank) {
    if (ranks[rank].bytes != ranks[0].bytes || ranks[rank].fill != ranks[0].fill) {
      fail(ErrorKind::kInvalidArgument, "the ranks ask for different buffers: rank 0 ", ranks[0].bytes,
           " bytes at rest ", ranks[0].fill, ", rank ", rank, " ", ranks[rank].bytes, " bytes at rest ",
           ranks[rank].fill);
    }
  }
}

// "rank 1: NAME=value" of the first rank that forbids multicast objects, empty if none does.
std::string forbidden_by(const Ranks& ranks) {
  int rank = first_rank(ranks, [](const Capabilities& c) { return !c.multicast_forbidden.empty(); });
  return rank >= 0 ? str("rank ", rank, ": ", ranks[rank].multicast_forbidden) : "";
}

// NCCL makes multicast objects of its own unless this variable says no. It is the user's to set: NCCL may have read it
// before, and other groups of the process obey it too.
std::string nccl_obstacle(const Ranks& ranks) {
  const std::string forbidden = forbidden_by(ranks);
  if (forbidden.empty()) return "";
  int rank = first_rank(ranks, [](const Capabilities& c) {
    return c.multicast_forbidden.find("NCCL_NVLS_ENABLE=") == std::string::npos;
  });
  if (rank < 0) return "";
  return str("multicast objects are forbidden (", forbidden,
             "), and NCCL makes its own unless NCCL_NVLS_ENABLE=0, which rank ", rank, " has not set");
}

// The given exchange works everywhere: one rank that asks for it has it for all.
Bootstrap choose_bootstrap(const Ranks& ranks, HandleType handle, bool nccl_possible) {
  const auto any = [&](Bootstrap asked) {
    return std::any_of(ranks.begin(), ranks.end(), [&](const Capabilities& c) { return c.bootstrap == asked; });
  };
  if (any(Bootstrap::kStore)) return Bootstrap::kStore;
  if (any(Bootstrap::kNccl)) return Bootstrap::kNccl;
  const bool possible =
      nccl_possible && std::all_of(ranks.begin(), ranks.end(), [](const Capabilities& c) { return c.has_nccl; });
  return handle == HandleType::kFabric && possible ? Bootstrap::kNccl : Bootstrap::kStore;
}

}  // namespace

Plan choose_plan(const std::vector<Capabilities>& ranks) {
  check_same_request(ranks);
  Plan plan;
  std::string no_fabric = fabric_obstacle(ranks);
  std::string no_fd = fd_obstacle(ranks);
  if (no_fabric.empty()) {
    plan.handle = HandleType::kFabric;
  } else if (no_fd.empty()) {
    plan.handle = HandleType::kPosixFd;
  } else {
    fail(ErrorKind::kUnsupported,
         count_hosts(hosts(ranks)) > 1 ? "the group spans hosts without a shared NVLink fabric"
                                       : "the ranks' devices can't share memory",
         ".\n  Fabric handles: ", no_fabric, ".\n  File descriptors: ", no_fd, ".", table(ranks));
  }

  const std::string shared = shared_device(ranks), no_nccl = nccl_obstacle(ranks);
  plan.bootstrap = choose_bootstrap(ranks, plan.handle, shared.empty() && no_nccl.empty());
  if (plan.bootstrap == Bootstrap::kNccl && !shared.empty()) {
    fail(ErrorKind::kUnsupported, shared,
         ", which NCCL refuses; give each rank its own device, or set bootstrap=\"store\"");
  }
  if (plan.bootstrap == Bootstrap::kNccl && !no_nccl.empty()) {
    fail(ErrorKind::kUnsupported, "bootstrap=\"nccl\" can't be used: ", no_nccl,
         "; set it on every rank before the program starts, or set bootstrap=\"store\"");
  }

  plan.multicast_problem = multicast_obstacle(ranks);
  plan.multicast = plan.multicast_problem.empty();
  plan.multicast_forbidden = forbidden_by(ranks);
  plan.mapping_hint = mapping_hint(ranks);
  plan.granularity = ranks[0].granularity;
  plan.min_multiprocessors = ranks[0].multiprocessors;
  for (const Capabilities& c : ranks) {
    plan.granularity = std::max(plan.granularity, c.granularity);
    plan.min_multiprocessors = std::min(plan.min_multiprocessors, c.multiprocessors);
  }
  return plan;
}

}  // namespace mnnvl
