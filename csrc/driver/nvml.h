// The one thing asked of NVML: a device's NVLink fabric.
#pragma once

#include <string>

#include "driver/cuda_driver.h"

namespace mnnvl {

// Loads and initialises NVML at the first call. Never throws.
FabricInfo nvml_fabric_info(const CUuuid& uuid);

// Empty when NVML works, else why not. Never throws.
std::string nvml_problem();

// "GPU-xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx" as NVML and nvidia-smi write it.
std::string uuid_text(const unsigned char* bytes, const char* prefix);

}  // namespace mnnvl
