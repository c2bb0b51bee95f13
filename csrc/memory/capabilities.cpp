#include "memory/capabilities.h"

#include <unistd.h>

#include <algorithm>

#include "driver/nvml.h"
#include "memory/allocation.h"
#include "system/unique_fd.h"

namespace mnnvl {
namespace {

int attribute(const CudaDriver& driver, CUdevice device, CUdeviceAttribute which) {
  int value = 0;
  check(driver, driver.device_get_attribute(&value, which, device), "cuDeviceGetAttribute", " ",
        static_cast<int>(which));
  return value;
}

// An attribute can say yes where the driver then says no, so the answer is what a small allocation says.
std::string try_handle_type(const CudaDriver& driver, int device, HandleType type, size_t size) {
  try {
    Allocation allocation = Allocation::create(driver, device, type, size);
    if (type == HandleType::kFabric) {
      allocation.export_fabric();
    } else {
      allocation.export_fd();
    }
    return "";
  } catch (const Error& error) {
    std::string hint;
    if (type == HandleType::kFabric && access("/dev/nvidia-caps-imex-channels", F_OK) != 0) {
      hint = " (this process sees no IMEX channel in /dev/nvidia-caps-imex-channels)";
    }
    return error.what() + hint;
  }
}

int compute_capability(const CudaDriver& driver, CUdevice device) {
  return 10 * attribute(driver, device, kAttributeComputeCapabilityMajor) +
         attribute(driver, device, kAttributeComputeCapabilityMinor);
}

std::string name_of(const CudaDriver& driver, CUdevice device) {
  char name[256] = "";
  check(driver, driver.device_get_name(name, sizeof(name) - 1, device), "cuDeviceGetName");
  return name;
}

CUdevice find_device(const CudaDriver& driver, Capabilities* found) {
  CUdevice device = 0, current = 0;
  check(driver, driver.device_get(&device, found->device), "cuDeviceGet", " of ordinal ", found->device);
  check(driver, driver.ctx_get_device(&current), "cuCtxGetDevice", " (is the device's primary context current?)");
  if (current != device) {
    fail(ErrorKind::kInvalidArgument, "the current CUDA context is device ", current,
         "'s, but the buffer is for device ", device);
  }
  found->device_name = name_of(driver, device);
  CUuuid uuid{};
  check(driver, driver.device_get_uuid(&uuid, device), "cuDeviceGetUuid");
  found->device_uuid = uuid_text(uuid.bytes, "GPU-");
  found->multiprocessors = attribute(driver, device, kAttributeMultiprocessorCount);
  if (attribute(driver, device, kAttributeVirtualMemoryManagement) == 0) {
    fail(ErrorKind::kUnsupported, "device ", found->device, " (", found->device_name,
         ") has no virtual memory management (cuMemCreate)");
  }

  FabricInfo fabric = driver.fabric_info(uuid);
  found->cluster_problem = fabric.problem;
  if (fabric.joined()) {
    found->cluster_uuid = uuid_text(fabric.cluster_uuid.data(), "");
    found->clique = fabric.clique;
  }
  return device;
}

}  // namespace

void check_supported(const CudaDriver& driver, int ordinal) {
  CUdevice device = 0;
  check(driver, driver.device_get(&device, ordinal), "cuDeviceGet", " of ordinal ", ordinal);
  const int capability = compute_capability(driver, device);
  if (capability >= kMinComputeCapability) return;
  fail(ErrorKind::kUnsupported, "device ", ordinal, " (", name_of(driver, device), ") has compute capability ",
       capability / 10, ".", capability % 10, ", and mnnvl needs 9.0 or newer on every rank");
}

Capabilities find_capabilities(const CudaDriver& driver, const SymmetricBufferOptions& options) {
  Capabilities found;
  found.host = host_identity(options.host_id);
  check_known(found.host);
  found.device = options.device;
  found.bootstrap = options.bootstrap;
  found.bytes = options.bytes;
  found.fill = options.fill;
  if (options.bytes == 0) fail(ErrorKind::kInvalidArgument, "a symmetric buffer of 0 bytes");
  check_supported(driver, options.device);
  const CUdevice device = find_device(driver, &found);

  if (attribute(driver, device, kAttributePosixFdHandles) == 0) found.fd_problem = "the device does not support it";
  if (attribute(driver, device, kAttributeFabricHandles) == 0) found.fabric_problem = "the device does not support it";
  found.granularity = allocation_granularity(driver, found.device, HandleType::kPosixFd);
  if (found.fabric_problem.empty()) {
    // A driver may refuse the question where it refuses the handles; the answer above then stands.
    CUmemAllocationProp prop = allocation_prop(found.device, HandleType::kFabric);
    size_t granularity = 0;
    if (driver.mem_get_allocation_granularity(&granularity, &prop, kGranularityRecommended) == kCudaSuccess) {
      found.granularity = std::max<uint64_t>(found.granularity, granularity);
    }
  }
  if (found.fd_problem.empty())
    found.fd_problem = try_handle_type(driver, found.device, HandleType::kPosixFd, found.granularity);
  if (found.fabric_problem.empty())
    found.fabric_problem = try_handle_type(driver, found.device, HandleType::kFabric, found.granularity);

  const std::string& forbidden = options.multicast_forbidden;
  found.multicast_forbidden = forbidden;
  if (options.multicast == MulticastMode::kOff) {
    found.multicast_problem = "switched off" + (forbidden.empty() ? "" : " by " + forbidden);
  } else if (!forbidden.empty()) {
    found.multicast_problem = "switched off by " + forbidden;
  } else if (!driver.has_multicast()) {
    found.multicast_problem = "the driver is too old";
  } else if (attribute(driver, device, kAttributeMulticast) == 0) {
    found.multicast_problem = "the device does not support it";
  }
  return found;
}

std::string Capabilities::serialise() const {
  RecordWriter writer;
  host.serialise(writer);
  writer.put(device).put(device_name).put(device_uuid).put(multiprocessors).put(granularity);
  writer.put(fd_problem).put(fabric_problem).put(cluster_uuid).put(clique).put(cluster_problem).put(multicast_problem);
  writer.put(multicast_forbidden).put(bootstrap).put(has_nccl).put(bytes).put(fill);
  return writer.bytes();
}

Capabilities Capabilities::parse(const std::string& record, int rank) {
  Capabilities c;
  RecordReader reader(record, rank);
  c.host = HostIdentity::parse(reader);
  reader.get(c.device).get_text(c.device_name).get_text(c.device_uuid).get(c.multiprocessors).get(c.granularity);
  reader.get_text(c.fd_problem)
      .get_text(c.fabric_problem)
      .get_text(c.cluster_uuid)
      .get(c.clique)
      .get_text(c.cluster_problem)
      .get_text(c.multicast_problem);
  reader.get_text(c.multicast_forbidden).get(c.bootstrap, Bootstrap::kAuto).get(c.has_nccl).get(c.bytes).get(c.fill);
  reader.finish();
  check_granularity(c.granularity, rank);
  if (c.multiprocessors < 1)
    fail(ErrorKind::kSystem, "rank ", rank, " says that its device has ", c.multiprocessors, " multiprocessors");
  return c;
}

void check_granularity(uint64_t granularity, int rank) {
  constexpr uint64_t kLargest = uint64_t{1} << 32;  // of memory; what is computed from it stays far from overflow
  if (granularity > 0 && granularity <= kLargest) return;
  fail(ErrorKind::kSystem, "rank ", rank, " says that its driver's granularity is ", granularity, " bytes");
}

std::string Capabilities::where() const {
  return str("host ", host.hostname, ", device ", device, " ", device_name, " ", device_uuid);
}

}  // namespace mnnvl
