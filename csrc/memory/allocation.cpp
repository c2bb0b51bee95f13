#include "memory/allocation.h"

#include <errno.h>
#include <fcntl.h>

#include <utility>

namespace mnnvl {
namespace {

CUdevice device_of(const CudaDriver& driver, int ordinal) {
  CUdevice device = 0;
  check(driver, driver.device_get(&device, ordinal), "cuDeviceGet", " of ordinal ", ordinal);
  return device;
}

const char* name(HandleType type) { return type == HandleType::kFabric ? "fabric" : "descriptor"; }

}  // namespace

CUmemHandleType driver_handle_type(HandleType type) {
  return type == HandleType::kFabric ? kMemHandleFabric : kMemHandlePosixFd;
}

CUmemAllocationProp allocation_prop(int device, HandleType type) {
  CUmemAllocationProp prop{};
  prop.type = kMemAllocationPinned;
  prop.requestedHandleTypes = driver_handle_type(type);
  prop.location = {kMemLocationDevice, device};
  return prop;
}

size_t allocation_granularity(const CudaDriver& driver, int device, HandleType type) {
  CUmemAllocationProp prop = allocation_prop(device, type);
  size_t granularity = 0;
  check(driver, driver.mem_get_allocation_granularity(&granularity, &prop, kGranularityRecommended),
        "cuMemGetAllocationGranularity", " for ", name(type), " handles on device ", device);
  return granularity;
}

Allocation Allocation::create(const CudaDriver& driver, int device, HandleType type, size_t size) {
  CUmemAllocationProp prop = allocation_prop(device, type);
  CUmemHandle handle = 0;
  check(driver, driver.mem_create(&handle, size, &prop, 0), "cuMemCreate", " of ", size, " bytes with a ", name(type),
        " handle on device ", device);
  return Allocation(driver, handle);
}

Allocation Allocation::create_multicast(const CudaDriver& driver, HandleType type, size_t size, int world_size) {
  CUmulticastObjectProp prop{};
  prop.numDevices = static_cast<unsigned int>(world_size);
  prop.size = size;
  prop.handleTypes = driver_handle_type(type);
  CUmemHandle handle = 0;
  check(driver, driver.multicast_create(&handle, &prop), "cuMulticastCreate", " of ", size, " bytes for ", world_size,
        " devices");
  if (handle == 0) fail(ErrorKind::kSystem, "cuMulticastCreate succeeded but gave no object");
  return Allocation(driver, handle);
}

Allocation Allocation::import_fabric(const CudaDriver& driver, const CUmemFabricHandle& fabric) {
  CUmemFabricHandle copy = fabric;
  CUmemHandle handle = 0;
  check(driver, driver.mem_import_from_shareable_handle(&handle, &copy, kMemHandleFabric),
        "cuMemImportFromShareableHandle", " of a fabric handle");
  return Allocation(driver, handle);
}

Allocation Allocation::import_fd(const CudaDriver& driver, int fd) {
  CUmemHandle handle = 0;
  void* os_handle = reinterpret_cast<void*>(static_cast<intptr_t>(fd));
  check(driver, driver.mem_import_from_shareable_handle(&handle, os_handle, kMemHandlePosixFd),
        "cuMemImportFromShareableHandle", " of a descriptor");
  return Allocation(driver, handle);
}

Allocation::~Allocation() {
  if (driver_ != nullptr) driver_->mem_release(handle_);
}

void Allocation::release() {
  const CudaDriver* driver = std::exchange(driver_, nullptr);
  if (driver != nullptr) check(*driver, driver->mem_release(handle_), "cuMemRelease");
}

CUmemFabricHandle Allocation::export_fabric() const {
  CUmemFabricHandle fabric{};
  check(*driver_, driver_->mem_export_to_shareable_handle(&fabric, handle_, kMemHandleFabric, 0),
        "cuMemExportToShareableHandle", " as a fabric handle");
  return fabric;
}

UniqueFd Allocation::export_fd() const {
  int fd = -1;
  check(*driver_, driver_->mem_export_to_shareable_handle(&fd, handle_, kMemHandlePosixFd, 0),
        "cuMemExportToShareableHandle", " as a descriptor");
  UniqueFd owned(fd);
  // The driver leaves it to be inherited: a program that this process starts meanwhile would hold the memory.
  if (fcntl(fd, F_SETFD, FD_CLOEXEC) != 0) fail_errno(errno, "setting close-on-exec for an exported descriptor");
  return owned;
}

AddressRange::AddressRange(const CudaDriver& driver, size_t size, size_t alignment) : driver_(driver), size_(size) {
  check(driver, driver.mem_address_reserve(&address_, size, alignment, 0, 0), "cuMemAddressReserve", " of ", size,
        " bytes");
  if (address_ == 0) fail(ErrorKind::kSystem, "cuMemAddressReserve succeeded but gave a null address");
}

AddressRange::~AddressRange() { driver_.mem_address_free(address_, size_); }

Mapping::Mapped::Mapped(const AddressRange& r, const Allocation& allocation) : range(&r) {
  const CudaDriver& driver = r.driver();
  check(driver, driver.mem_map(r.address(), r.size(), 0, allocation.handle(), 0), "cuMemMap", " of ", r.size(),
        " bytes");
}

Mapping::Mapped::~Mapped() {
  if (range != nullptr) range->driver().mem_unmap(range->address(), range->size());
}

void Mapping::Mapped::release() {
  const AddressRange* r = std::exchange(range, nullptr);
  if (r == nullptr) return;
  check(r->driver(), r->driver().mem_unmap(r->address(), r->size()), "cuMemUnmap", " of ", r->size(), " bytes");
}

Mapping::Mapping(const AddressRange& range, int device, const Allocation& allocation) : mapped_(range, allocation) {
  CUmemAccessDesc access{{kMemLocationDevice, device}, kMemAccessReadWrite};
  check(range.driver(), range.driver().mem_set_access(range.address(), range.size(), &access, 1), "cuMemSetAccess",
        " of ", range.size(), " bytes for device ", device);
}

MulticastBinding::MulticastBinding(const CudaDriver& driver, int device, const Allocation& multicast,
                                   const Allocation& memory, size_t size)
    : driver_(driver), device_(device_of(driver, device)), multicast_(multicast.handle()), size_(size) {
  check(driver, driver.multicast_bind_mem(multicast_, 0, memory.handle(), 0, size, 0), "cuMulticastBindMem", " of ",
        size, " bytes");
  bound_ = true;
}

MulticastBinding::~MulticastBinding() {
  if (bound_) driver_.multicast_unbind(multicast_, device_, 0, size_);
}

void MulticastBinding::release() {
  if (!std::exchange(bound_, false)) return;
  check(driver_, driver_.multicast_unbind(multicast_, device_, 0, size_), "cuMulticastUnbind", " of ", size_, " bytes");
}

}  // namespace mnnvl
