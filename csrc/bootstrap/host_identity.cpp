#include "bootstrap/host_identity.h"

#include <errno.h>
#include <unistd.h>

#include <fstream>
#include <set>

#include "common/error.h"

namespace mnnvl {
namespace {

constexpr const char* kUnknown = "?";

std::string link_target(const char* path) {
  char text[256];
  ssize_t length = readlink(path, text, sizeof(text));
  return length > 0 ? std::string(text, length) : kUnknown;
}

std::string host_name() {
  char text[256] = "";
  gethostname(text, sizeof(text) - 1);
  return text;
}

// Empty where there is no descriptor to read it with, which mustn't pass for another host.
std::string boot_id() {
  std::string id;
  errno = 0;
  std::ifstream("/proc/sys/kernel/random/boot_id") >> id;
  if (!id.empty()) return id;
  return errno == EMFILE || errno == ENFILE ? "" : "boot of " + host_name();
}

}  // namespace

void HostIdentity::serialise(RecordWriter& writer) const {
  writer.put(host_id).put(boot_id).put(hostname).put(pid).put(pid_namespace);
}

HostIdentity HostIdentity::parse(RecordReader& reader) {
  HostIdentity identity;
  reader.get_text(identity.host_id)
      .get_text(identity.boot_id)
      .get_text(identity.hostname)
      .get(identity.pid)
      .get_text(identity.pid_namespace);
  return identity;
}

HostIdentity host_identity(const std::string& host_id) {
  HostIdentity identity;
  identity.boot_id = boot_id();
  identity.hostname = host_name();
  identity.pid = getpid();
  identity.pid_namespace = link_target("/proc/self/ns/pid");
  identity.host_id = host_id.empty() ? identity.boot_id + " " + link_target("/proc/thread-self/ns/net") : host_id;
  return identity;
}

void check_known(const HostIdentity& identity) {
  if (identity.boot_id.empty()) fail_errno(EMFILE, "reading the kernel's boot id");
}

std::vector<int> visible_pids(const std::vector<HostIdentity>& identities, int rank) {
  const HostIdentity& self = identities[rank];
  const bool known = !self.boot_id.empty() && self.pid_namespace != kUnknown;
  std::vector<int> pids;
  for (const HostIdentity& peer : identities) {
    bool visible = known && peer.host_id == self.host_id && peer.boot_id == self.boot_id &&
                   peer.pid_namespace == self.pid_namespace && peer.pid != self.pid;
    pids.push_back(visible ? peer.pid : -1);
  }
  return pids;
}

int count_hosts(const std::vector<HostIdentity>& identities) {
  std::set<std::string> hosts;
  for (const HostIdentity& identity : identities) hosts.insert(identity.host_id);
  return static_cast<int>(hosts.size());
}

}  // namespace mnnvl
