// What the 64 bytes of a simulated fabric handle hold.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

#include "driver/cuda_types.h"

namespace mnnvl::fake {

constexpr uint64_t kFabricMagic = 0x316261666b6166;

struct FabricHandle {
  uint64_t magic = kFabricMagic;
  int32_t pid = 0;  // of the exporter, and its descriptor of the memory, which tells whether it still lives
  int32_t fd = -1;
  uint64_t inode = 0;
  uint64_t size = 0;
  uint64_t cluster = 0;
  uint32_t clique = 0;
  uint32_t multicast = 0;
};
static_assert(sizeof(FabricHandle) <= sizeof(CUmemFabricHandle));

// 0, a zero uuid, for a device outside any fabric.
inline uint64_t cluster_number(const std::string& cluster) {
  return cluster.empty() ? 0 : std::hash<std::string>()(cluster) | 1;
}

}  // namespace mnnvl::fake
