// What this machine offers, for `mnnvl doctor`. Reads attributes only: no context, no allocation, no multicast
// object, no socket.
#pragma once

#include <string>
#include <vector>

namespace mnnvl {

struct DeviceProbe {
  int ordinal = 0;
  std::string name;
  std::string uuid;  // "GPU-…"
  int compute_capability = 0;
  int multiprocessors = 0;
  bool virtual_memory = false;  // cuMemCreate and friends
  bool fd_handles = false;  // attribute; set-up tries an allocation before it believes it
  bool fabric_handles = false;  // likewise
  bool multicast = false;  // attribute
  std::string fabric_state;  // NVML: "completed", "not supported", …; empty when unknown
  std::string cluster_uuid;  // empty: in no fabric cluster
  unsigned int clique = 0;
  std::string fabric_problem;  // why in none
  std::string problem;  // why the device could not be looked at, else empty
};

struct MachineProbe {
  bool driver_loaded = false;
  std::string driver_problem;
  int driver_version = 0;  // 13000 for CUDA 13.0
  bool nvml_loaded = false;
  std::string nvml_problem;
  bool nccl_loaded = false;
  std::string nccl_problem;
  int nccl_version = 0;  // 22809 for 2.28.9
  std::vector<std::string> imex_channels;  // device files that this process sees
  std::string host_id;  // as ranks compare it
  std::vector<DeviceProbe> devices;
};

// Never throws. `nccl_path` as in load_nccl().
MachineProbe probe_machine(const std::string& nccl_path) noexcept;

}  // namespace mnnvl
