#include "driver/nvml.h"

#include <algorithm>
#include <cstdio>
#include <cstring>

#include "driver/library.h"

namespace mnnvl {
namespace {

using NvmlDevice = void*;
constexpr int kNvmlSuccess = 0;

// nvmlGpuFabricInfo_t and its versioned successor, as in nvml.h.
struct NvmlFabricInfo {
  unsigned char cluster_uuid[16];
  int status;
  unsigned int clique;
  unsigned char state;
};
struct NvmlFabricInfoV2 {
  unsigned int version;
  unsigned char cluster_uuid[16];
  int status;
  unsigned int clique;
  unsigned char state;
  unsigned int health_mask;
};
static_assert(sizeof(NvmlFabricInfo) == 28 && sizeof(NvmlFabricInfoV2) == 36);
constexpr unsigned int kNvmlFabricInfoV2 = sizeof(NvmlFabricInfoV2) | (2u << 24);
constexpr unsigned char kNvmlFabricCompleted = 3;

struct Nvml {
  int (*init)() = nullptr;
  const char* (*error_string)(int) = nullptr;
  int (*device_by_uuid)(const char*, NvmlDevice*) = nullptr;
  int (*fabric_info_v)(NvmlDevice, NvmlFabricInfoV2*) = nullptr;
  int (*fabric_info)(NvmlDevice, NvmlFabricInfo*) = nullptr;
  std::string problem;

  Nvml() {
    Library library = Library::open("libnvidia-ml.so.1");
    if (!library.loaded()) {
      problem = "NVML can't be loaded: " + library.problem();
      return;
    }
    library.resolve(&error_string, "nvmlErrorString");
    library.resolve(&fabric_info_v, "nvmlDeviceGetGpuFabricInfoV");
    library.resolve(&fabric_info, "nvmlDeviceGetGpuFabricInfo");
    if (!library.resolve(&init, "nvmlInit_v2") || !library.resolve(&device_by_uuid, "nvmlDeviceGetHandleByUUID")) {
      problem = "NVML lacks nvmlInit_v2 or nvmlDeviceGetHandleByUUID";
      return;
    }
    if (int code = init()) problem = "nvmlInit failed: " + text(code);
  }

  std::string text(int code) const {
    const char* words = error_string != nullptr ? error_string(code) : nullptr;
    return str(words != nullptr ? words : "error", " (", code, ")");
  }
};

const Nvml& nvml() {
  static const Nvml library;
  return library;
}

const char* state_name(unsigned char state) {
  static const char* const names[] = {"not supported", "not started", "in progress", "completed"};
  return state < 4 ? names[state] : "unknown";
}

}  // namespace

std::string uuid_text(const unsigned char* b, const char* prefix) {
  char text[40];
  std::snprintf(text, sizeof(text), "%02x%02x%02x%02x-%02x%02x-%02x%02x-%02x%02x-%02x%02x%02x%02x%02x%02x", b[0], b[1],
                b[2], b[3], b[4], b[5], b[6], b[7], b[8], b[9], b[10], b[11], b[12], b[13], b[14], b[15]);
  return std::string(prefix) + text;
}

std::string nvml_problem() { return nvml().problem; }

FabricInfo nvml_fabric_info(const CUuuid& uuid) {
  const Nvml& library = nvml();
  FabricInfo result;
  result.problem = library.problem;
  if (!result.problem.empty()) return result;
  NvmlDevice device = nullptr;
  // A MIG instance is known to NVML under another prefix; it is in no fabric.
  if (int code = library.device_by_uuid(uuid_text(uuid.bytes, "GPU-").c_str(), &device)) {
    result.problem = "NVML does not know the device: " + library.text(code);
    return result;
  }
  NvmlFabricInfoV2 info{};
  int code = 0;
  if (library.fabric_info_v != nullptr) {
    info.version = kNvmlFabricInfoV2;
    code = library.fabric_info_v(device, &info);
  } else if (library.fabric_info != nullptr) {
    NvmlFabricInfo old{};
    code = library.fabric_info(device, &old);
    std::memcpy(info.cluster_uuid, old.cluster_uuid, sizeof(info.cluster_uuid));
    info.status = old.status;
    info.clique = old.clique;
    info.state = old.state;
  } else {
    result.problem = "this NVML knows no GPU fabric";
    return result;
  }
  if (code != kNvmlSuccess) {
    result.problem = "nvmlDeviceGetGpuFabricInfo failed: " + library.text(code);
    return result;
  }
  std::copy(info.cluster_uuid, info.cluster_uuid + 16, result.cluster_uuid.begin());
  result.clique = info.clique;
  result.state = state_name(info.state);
  // The state can be "completed" with an all-zero uuid (a device that has no fabric to join): that is no cluster.
  bool zero =
      std::all_of(result.cluster_uuid.begin(), result.cluster_uuid.end(), [](unsigned char c) { return c == 0; });
  if (info.state != kNvmlFabricCompleted) {
    result.problem = "fabric registration is " + result.state;
  } else if (info.status != kNvmlSuccess) {
    result.problem = "fabric registration ended with " + library.text(info.status);
  } else if (zero) {
    result.problem = "the fabric cluster uuid is zero";
  }
  return result;
}

}  // namespace mnnvl
