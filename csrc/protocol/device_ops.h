// What the set-up needs a kernel or a copy for. kernels/ implements it; the test double of the driver replaces it.
#pragma once

#include <cstddef>
#include <cstdint>

namespace mnnvl {

struct DeviceOps {
  // Stores `count` 32-bit words from host memory to a mapped device address, through multicast stores if `multicast`.
  // Complete (visible at system scope) on return.
  void (*store_words)(int device, uint64_t address, const uint32_t* words, size_t count, bool multicast);
  // Fills device memory with a 32-bit value; complete on return.
  void (*fill_words)(int device, uint64_t address, uint32_t value, size_t count);
  // Reads device words back to the host.
  void (*load_words)(int device, uint64_t address, uint32_t* words, size_t count);
};

}  // namespace mnnvl
