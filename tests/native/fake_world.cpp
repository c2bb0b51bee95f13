#include "native/fake_world.h"

#include <errno.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include "common/error.h"

namespace mnnvl::fake {
namespace {

struct MulticastMapping {
  size_t size;
  std::shared_ptr<MulticastState> state;
};
std::mutex mappings_mutex;
std::map<CUdeviceptr, MulticastMapping> multicast_mappings;

}  // namespace

void MulticastState::store(size_t offset, const void* bytes, size_t size) const {
  for (const auto& [rank, memory] : bound) {
    if (rank == lost_rank) continue;
    if (pwrite(memory->get(), bytes, size, static_cast<off_t>(offset)) != static_cast<ssize_t>(size))
      fail_errno(errno, "pwrite");
  }
}

bool CommunicatorGroup::shared_device() const {
  std::set<int> devices;
  for (const auto& [rank, device] : members) devices.insert(device);
  return devices.size() != members.size();
}

World::World(std::vector<Device> devices, std::vector<Fault> faults, std::vector<Corruption> corruptions,
             int multicast_lost_rank)
    : devices_(std::move(devices)),
      faults_(std::move(faults)),
      corruptions_(std::move(corruptions)),
      multicast_lost_rank_(multicast_lost_rank),
      calls_(devices_.size()) {}

std::optional<int> World::enter(int rank, const char* function) {
  std::lock_guard<std::mutex> lock(calls_mutex_);
  int64_t nth = ++calls_[rank][function];
  for (const Fault& fault : faults_) {
    if (fault.rank == rank && fault.function == function && fault.nth == nth) return fault.code;
  }
  return std::nullopt;
}

std::map<std::string, int64_t> World::calls(int rank) const {
  std::lock_guard<std::mutex> lock(calls_mutex_);
  return calls_[rank];
}

std::map<std::string, int64_t> World::leaks() const {
  std::lock_guard<std::mutex> lock(mutex);
  std::map<std::string, int64_t> alive;
  auto note = [&alive](const char* kind, size_t count) {
    if (count > 0) alive[kind] = static_cast<int64_t>(count);
  };
  note("handles", handles.size());
  note("reservations", reservations.size());
  note("mappings", mappings.size());
  note("device memory", device_memory.size());
  note("streams", streams.size());
  note("communicators", static_cast<size_t>(communicators));
  return alive;
}

const Corruption* World::corruption(int rank, int owner) const {
  for (const Corruption& c : corruptions_) {
    if (c.rank == rank && c.owner == owner) return &c;
  }
  return nullptr;
}

void register_multicast_mapping(CUdeviceptr address, size_t size, std::shared_ptr<MulticastState> state) {
  std::lock_guard<std::mutex> lock(mappings_mutex);
  multicast_mappings[address] = {size, std::move(state)};
}

void forget_multicast_mapping(CUdeviceptr address) {
  std::lock_guard<std::mutex> lock(mappings_mutex);
  multicast_mappings.erase(address);
}

void multicast_store(CUdeviceptr address, const void* bytes, size_t size) {
  std::lock_guard<std::mutex> lock(mappings_mutex);
  auto after = multicast_mappings.upper_bound(address);
  if (after != multicast_mappings.begin()) {
    auto at = std::prev(after);
    size_t offset = address - at->first;
    if (offset + size <= at->second.size) return at->second.state->store(offset, bytes, size);
  }
  fail(ErrorKind::kSystem, "a multicast store of ", size, " bytes to ", address,
       ", where no multicast object is mapped");
}

UniqueFd make_memfd(const char* name, size_t size) {
  UniqueFd fd(memfd_create(name, MFD_CLOEXEC));
  if (fd && ftruncate(fd.get(), static_cast<off_t>(size)) != 0) fd.reset();
  return fd;
}

ino_t inode_of(int fd) {
  struct stat status{};
  return fstat(fd, &status) == 0 ? status.st_ino : 0;
}

}  // namespace mnnvl::fake
