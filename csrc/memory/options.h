// What a caller asks of a set-up.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace mnnvl {

enum class HandleType : int { kPosixFd = 0, kFabric = 1 };
enum class MulticastMode : int { kOff = 0, kAuto = 1 };
// How handles are exchanged. kAuto: over NCCL where they are fabric handles, every rank has NCCL and a device of its
// own, and NCCL may be used at all (see multicast_forbidden), else over the given exchange: descriptors need only an
// address, and a first exchange over NCCL leaves some 280 MiB in the context.
enum class Bootstrap : int { kNccl = 0, kStore = 1, kAuto = 2 };

constexpr int64_t kDefaultSetUpTimeoutMs = 300000;  // where the options say 0

struct SymmetricBufferOptions {
  int device = 0;               // CUDA ordinal; the caller has made its primary context current
  size_t bytes = 0;             // rounded up to the granularity that the plan needs
  uint32_t fill = 0x80000000u;  // value of every 32-bit word at rest
  MulticastMode multicast = MulticastMode::kAuto;
  // The variables in force that forbid multicast objects, all of them, as "NAME=value, NAME=value"; empty: allowed. One
  // rank's binds all, and binds NCCL too, which makes multicast objects of its own unless NCCL_NVLS_ENABLE is among
  // them.
  std::string multicast_forbidden;
  Bootstrap bootstrap = Bootstrap::kAuto;
  std::string host_id;     // empty: found out; tests and MNNVL_HOST_ID override it
  int64_t timeout_ms = 0;  // deadline of each wait inside the set-up
};

struct HostSegmentsOptions {
  size_t bytes = 0;     // per rank, zero-filled at start
  std::string host_id;  // empty: found out; MNNVL_HOST_ID overrides
  int64_t timeout_ms = 0;
};

}  // namespace mnnvl
