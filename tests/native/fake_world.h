// The test double's shared state: what the machines, drivers and NCCLs of all simulated ranks have in common. Ranks
// are threads of one process; memory alone, by either handle type, is also shared with ranks in other processes of
// this machine.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "driver/cuda_types.h"
#include "system/unique_fd.h"

namespace mnnvl::fake {

struct Device {
  int id = 0;  // makes the uuid
  std::string name = "Simulated GPU";
  std::string nvml_problem;  // instead of what it says of the fabric
  int compute_capability = 90;
  int multiprocessors = 132;
  bool fd_handles = true;
  std::string fabric_handles = "yes";  // "no": the attribute says so; "not_permitted": only the driver does
  std::string cluster;  // makes the fabric cluster's uuid; empty: the uuid is zero
  uint32_t clique = 0;
  bool multicast = true;

  bool maps_memory_of(const Device& other) const {
    return id == other.id || (name + other.name).find(" MIG ") == std::string::npos;
  }
};

// The nth call (from 1) of `function` on `rank` returns `code`. With code 0 it "succeeds" and gives a null handle or
// address. Functions that release something do so and then return the code.
struct Fault {
  int rank = 0;
  std::string function;  // "cuMemCreate", "ncclAllGather", …
  int nth = 1;
  int code = 0;
};

// What `rank` maps as `owner`'s memory is not that: memory nobody reads ("lost"), or another rank's ("misrouted").
struct Corruption {
  int rank = 0;
  int owner = 0;
  std::string kind;
};

// Physical memory, or a multicast object.
struct MulticastState {
  unsigned int device_count = 0;
  std::set<int> added;  // device ids
  std::map<int, std::shared_ptr<UniqueFd>> bound;  // by rank
  ino_t token = 0;  // of the descriptor that stands for it when exported
  int lost_rank = -1;  // a fault: stores don't reach this rank
  void store(size_t offset, const void* bytes, size_t size) const;
};

struct Object {
  int owner = -1;  // the rank that created it, -1 when another process did
  size_t size = 0;
  std::shared_ptr<UniqueFd> memory;  // of physical memory
  std::shared_ptr<MulticastState> multicast;  // of a multicast object
};

struct CommunicatorGroup {
  int size = 0;
  std::map<int, int> members;  // rank to device id
  std::vector<std::optional<std::string>> sent;
  bool shared_device() const;
};

class World {
 public:
  World(std::vector<Device> devices, std::vector<Fault> faults, std::vector<Corruption> corruptions,
        int multicast_lost_rank);

  const Device& device(int rank) const { return devices_[rank]; }
  int multicast_lost_rank() const { return multicast_lost_rank_; }

  // Counts the call; gives the fault's code if this call is to fail.
  std::optional<int> enter(int rank, const char* function);
  std::map<std::string, int64_t> calls(int rank) const;

  // What is alive, by kind; kinds without any are absent. Empty after a correct tear-down.
  std::map<std::string, int64_t> leaks() const;

  const Corruption* corruption(int rank, int owner) const;

  // Guarded by `mutex`, for the drivers.
  mutable std::mutex mutex;
  std::map<CUmemHandle, Object> handles;
  std::map<CUdeviceptr, size_t> reservations;
  struct Mapped {
    size_t size = 0;
    bool multicast = false;
  };
  std::map<CUdeviceptr, Mapped> mappings;
  std::map<ino_t, int> owners;  // of memory created here
  std::map<int, std::weak_ptr<UniqueFd>> memory_of;  // a rank's newest
  std::map<ino_t, std::weak_ptr<MulticastState>> multicasts;  // by token
  std::set<CUdeviceptr> device_memory;
  struct Pending {
    std::shared_ptr<CommunicatorGroup> group;
    CUdeviceptr receive = 0;
  };
  std::map<CUstream, Pending> streams;
  std::map<std::string, std::shared_ptr<CommunicatorGroup>> groups;  // by unique id
  int64_t communicators = 0;
  uint64_t next_handle = 0x1000;

 private:
  const std::vector<Device> devices_;
  const std::vector<Fault> faults_;
  const std::vector<Corruption> corruptions_;
  const int multicast_lost_rank_;
  mutable std::mutex calls_mutex_;
  std::vector<std::map<std::string, int64_t>> calls_;
};

// Multicast mappings of the process by address, for device code's double, which is given addresses alone.
void register_multicast_mapping(CUdeviceptr address, size_t size, std::shared_ptr<MulticastState> state);
void forget_multicast_mapping(CUdeviceptr address);
// A store through a multicast mapping reaches every bound member. Throws Error when there is no such mapping at
// `address`.
void multicast_store(CUdeviceptr address, const void* bytes, size_t size);

UniqueFd make_memfd(const char* name, size_t size);  // empty on failure
ino_t inode_of(int fd);  // 0 on failure

}  // namespace mnnvl::fake
