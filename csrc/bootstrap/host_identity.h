// Who and where a process is, for ranks to find out which of them share a host.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "bootstrap/record.h"

namespace mnnvl {

struct HostIdentity {
  std::string host_id;   // equal: descriptors can be passed between the two ranks
  std::string boot_id;   // of the kernel; empty: this process is at its limit of open files
  std::string hostname;  // for people
  int pid = 0;
  std::string pid_namespace;

  void serialise(RecordWriter& writer) const;
  static HostIdentity parse(RecordReader& reader);  // texts made readable
};

// The calling thread's identity. The host id is the kernel's boot id and the network namespace (abstract sockets end
// there, so two containers of one machine count as two hosts), unless `host_id` gives another. Never throws.
HostIdentity host_identity(const std::string& host_id);

// Throws where the identity isn't whole.
void check_known(const HostIdentity& identity);

// The pids, by rank, that this process can watch: same kernel, host id and pid namespace, of which it knows its own; -1
// for the others and for this process.
std::vector<int> visible_pids(const std::vector<HostIdentity>& identities, int rank);

// How many different host ids there are.
int count_hosts(const std::vector<HostIdentity>& identities);

}  // namespace mnnvl
