#include "memory/probe.h"

#include <dirent.h>

#include <algorithm>

#include "bootstrap/host_identity.h"
#include "driver/cuda_driver.h"
#include "driver/nccl.h"
#include "driver/nvml.h"

namespace mnnvl {
namespace {

// Runs one guarded probe; what it throws becomes the text of `problem`.
template <typename Probe>
bool guarded(std::string* problem, const Probe& probe) {
  try {
    probe();
    return true;
  } catch (const std::exception& error) {
    *problem = error.what();
    return false;
  }
}

int attribute(const CudaDriver& driver, CUdevice device, CUdeviceAttribute which) {
  int value = 0;
  driver.device_get_attribute(&value, which, device);  // an attribute unknown to the driver stays 0
  return value;
}

void probe_device(const CudaDriver& driver, DeviceProbe* probe) {
  CUdevice device = 0;
  check(driver, driver.device_get(&device, probe->ordinal), "cuDeviceGet");
  char name[256] = "";
  check(driver, driver.device_get_name(name, sizeof(name) - 1, device), "cuDeviceGetName");
  probe->name = name;
  CUuuid uuid{};
  check(driver, driver.device_get_uuid(&uuid, device), "cuDeviceGetUuid");
  probe->uuid = uuid_text(uuid.bytes, "GPU-");
  probe->compute_capability = 10 * attribute(driver, device, kAttributeComputeCapabilityMajor) +
                              attribute(driver, device, kAttributeComputeCapabilityMinor);
  probe->multiprocessors = attribute(driver, device, kAttributeMultiprocessorCount);
  probe->virtual_memory = attribute(driver, device, kAttributeVirtualMemoryManagement) != 0;
  probe->fd_handles = attribute(driver, device, kAttributePosixFdHandles) != 0;
  probe->fabric_handles = attribute(driver, device, kAttributeFabricHandles) != 0;
  probe->multicast = attribute(driver, device, kAttributeMulticast) != 0;
  FabricInfo fabric = driver.fabric_info(uuid);
  probe->fabric_state = fabric.state;
  probe->fabric_problem = fabric.problem;
  if (fabric.joined()) {
    probe->cluster_uuid = uuid_text(fabric.cluster_uuid.data(), "");
    probe->clique = fabric.clique;
  }
}

std::vector<std::string> imex_channels() {
  const std::string folder = "/dev/nvidia-caps-imex-channels";
  std::vector<std::string> channels;
  DIR* directory = opendir(folder.c_str());
  if (directory == nullptr) return channels;
  while (const dirent* entry = readdir(directory)) {
    if (entry->d_name[0] != '.') channels.push_back(folder + "/" + entry->d_name);
  }
  closedir(directory);
  std::sort(channels.begin(), channels.end());
  return channels;
}

void probe_driver(MachineProbe* machine) {
  const CudaDriver& driver = real_driver();
  machine->driver_loaded = true;
  driver.driver_get_version(&machine->driver_version);
  int count = 0;
  check(driver, driver.device_get_count(&count), "cuDeviceGetCount");
  for (int ordinal = 0; ordinal < count; ++ordinal) {
    DeviceProbe device;
    device.ordinal = ordinal;
    guarded(&device.problem, [&] { probe_device(driver, &device); });
    machine->devices.push_back(device);
  }
}

}  // namespace

MachineProbe probe_machine(const std::string& nccl_path) noexcept {
  MachineProbe machine;
  std::string ignored;
  guarded(&machine.driver_problem, [&] { probe_driver(&machine); });
  machine.nccl_loaded = guarded(&machine.nccl_problem, [&] { machine.nccl_version = load_nccl(nccl_path).version(); });
  guarded(&machine.nvml_problem, [&] { machine.nvml_problem = nvml_problem(); });
  machine.nvml_loaded = machine.nvml_problem.empty();
  guarded(&ignored, [&] {
    machine.imex_channels = imex_channels();
    machine.host_id = host_identity("").host_id;
  });
  return machine;
}

}  // namespace mnnvl
