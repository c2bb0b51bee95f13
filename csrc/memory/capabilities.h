// What each rank can do, and the one plan that all ranks derive from it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "bootstrap/host_identity.h"
#include "driver/cuda_driver.h"
#include "memory/options.h"

namespace mnnvl {

constexpr int kMinComputeCapability = 90;  // multimem and griddepcontrol

struct Capabilities {
  HostIdentity host;
  int device = 0;  // CUDA ordinal
  std::string device_name;
  std::string device_uuid;     // "GPU-…"
  int multiprocessors = 0;
  uint64_t granularity = 0;  // of an allocation
  // Why a handle type can't be used, empty when a small allocation of that type could be made and exported.
  std::string fd_problem;
  std::string fabric_problem;
  std::string cluster_uuid;    // of the NVLink fabric; empty: in none
  uint32_t clique = 0;
  std::string cluster_problem;    // why in none
  std::string multicast_problem;  // why this rank can't or may not use multicast, empty when it can
  std::string multicast_forbidden;  // as in the options
  Bootstrap bootstrap = Bootstrap::kAuto;
  bool has_nccl = false;
  uint64_t bytes = 0;  // what the options ask for; the same everywhere, or it is an error
  uint32_t fill = 0;

  std::string serialise() const;
  static Capabilities parse(const std::string& bytes, int rank);
  std::string where() const;  // "host a, device 0 NVIDIA H100 GPU-…"
};

struct Plan {
  HandleType handle = HandleType::kPosixFd;
  bool multicast = false;           // to be tried
  std::string multicast_problem;    // why not, naming the rank
  std::string multicast_forbidden;  // on some rank, as "rank 1: NAME=value"; empty: nowhere
  Bootstrap bootstrap = Bootstrap::kStore;  // never kAuto
  std::string mapping_hint;  // behind an error of mapping a peer's memory; empty: none
  uint64_t granularity = 0;  // the largest of all ranks
  int min_multiprocessors = 0;
};

// Throws kUnsupported for a device that no kernel of this package can run on, whatever it was built for.
void check_supported(const CudaDriver& driver, int device);

// Looks at this rank: tries a small allocation and export per handle type, releases it, and asks NVML about the
// fabric. Never creates or probes multicast: its support is an attribute. Throws Error when the device can't be used
// at all, or when its context is not current.
Capabilities find_capabilities(const CudaDriver& driver, const SymmetricBufferOptions& options);

// That sizes can be rounded up to what a rank said. Throws Error(kSystem) that names it.
void check_granularity(uint64_t granularity, int rank);

// Pure: the same plan, or the same Error, on every rank. kUnsupported with a table of all ranks when no handle type
// serves them all; kInvalidArgument when ranks ask for different buffers.
Plan choose_plan(const std::vector<Capabilities>& ranks);

}  // namespace mnnvl
