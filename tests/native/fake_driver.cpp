#include "native/fake_driver.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <functional>

#include "native/fake_fabric.h"
#include "native/fake_nccl.h"

namespace mnnvl::fake {
namespace {

void* pointer(CUdeviceptr address) { return reinterpret_cast<void*>(address); }

std::shared_ptr<UniqueFd> share(UniqueFd fd) { return fd ? std::make_shared<UniqueFd>(std::move(fd)) : nullptr; }
UniqueFd duplicate(int fd) { return UniqueFd(fcntl(fd, F_DUPFD_CLOEXEC, 3)); }

#define MNNVL_FAKE_ENTER(function) \
  if (auto code = world_->enter(rank_, function)) return *code
// For calls that hand out an object: code 0 is a success that gives null.
#define MNNVL_FAKE_ENTER_OUT(function, out) \
  if (auto code = world_->enter(rank_, function)) { \
    if (*code == kCudaSuccess) *(out) = 0; \
    return *code; \
  }

class FakeDriver final : public CudaDriver {
 public:
  FakeDriver(std::shared_ptr<World> world, int rank)
      : world_(std::move(world)), rank_(rank), device_(world_->device(rank)) {}

  CUresult init(unsigned int) const override { return kCudaSuccess; }
  CUresult driver_get_version(int* version) const override { return *version = 13000, kCudaSuccess; }
  CUresult get_error_name(CUresult, const char** name) const override {
    return *name = "SIMULATED_ERROR", kCudaSuccess;
  }
  CUresult get_error_string(CUresult, const char** text) const override { return *text = "simulated", kCudaSuccess; }

  CUresult device_get(CUdevice* device, int ordinal) const override {
    MNNVL_FAKE_ENTER("cuDeviceGet");
    *device = ordinal;
    return ordinal == rank_ ? kCudaSuccess : kCudaInvalidDevice;
  }
  CUresult device_get_count(int* count) const override { return *count = rank_ + 1, kCudaSuccess; }
  CUresult device_get_name(char* name, int length, CUdevice) const override {
    MNNVL_FAKE_ENTER("cuDeviceGetName");
    std::strncpy(name, device_.name.c_str(), length);
    return kCudaSuccess;
  }
  CUresult device_get_uuid(CUuuid* uuid, CUdevice) const override {
    MNNVL_FAKE_ENTER("cuDeviceGetUuid");
    std::memset(uuid->bytes, 0xab, sizeof(uuid->bytes));
    std::memcpy(uuid->bytes + 12, &device_.id, sizeof(device_.id));
    return kCudaSuccess;
  }
  CUresult device_get_attribute(int* value, CUdeviceAttribute attribute, CUdevice) const override {
    MNNVL_FAKE_ENTER("cuDeviceGetAttribute");
    switch (attribute) {
      case kAttributeMultiprocessorCount: *value = device_.multiprocessors; break;
      case kAttributeComputeCapabilityMajor: *value = device_.compute_capability / 10; break;
      case kAttributeComputeCapabilityMinor: *value = device_.compute_capability % 10; break;
      case kAttributeVirtualMemoryManagement: *value = 1; break;
      case kAttributePosixFdHandles: *value = device_.fd_handles; break;
      case kAttributeFabricHandles: *value = device_.fabric_handles != "no"; break;
      case kAttributeMulticast: *value = device_.multicast; break;
      default: return kCudaInvalidValue;
    }
    return kCudaSuccess;
  }
  CUresult ctx_get_device(CUdevice* device) const override {
    MNNVL_FAKE_ENTER("cuCtxGetDevice");
    return *device = rank_, kCudaSuccess;
  }

  CUresult mem_create(CUmemHandle* handle, size_t size, const CUmemAllocationProp* prop,
                      unsigned long long) const override {
    MNNVL_FAKE_ENTER_OUT("cuMemCreate", handle);
    bool fabric = (prop->requestedHandleTypes & kMemHandleFabric) != 0;
    if (fabric && device_.fabric_handles == "not_permitted") return kCudaNotPermitted;
    if (fabric ? device_.fabric_handles != "yes" : !device_.fd_handles) return kCudaNotSupported;
    if (size == 0 || size % kGranularity != 0 || prop->location.id != rank_) return kCudaInvalidValue;
    Object object;
    object.owner = rank_;
    object.size = size;
    object.memory = share(make_memfd("mnnvl-fake-memory", size));
    if (object.memory == nullptr) return kCudaOutOfMemory;
    std::lock_guard<std::mutex> lock(world_->mutex);
    world_->owners[inode_of(object.memory->get())] = rank_;
    world_->memory_of[rank_] = object.memory;
    *handle = add(std::move(object));
    return kCudaSuccess;
  }
  CUresult mem_release(CUmemHandle handle) const override {
    auto code = world_->enter(rank_, "cuMemRelease");
    std::lock_guard<std::mutex> lock(world_->mutex);
    if (world_->handles.erase(handle) == 0) return kCudaInvalidHandle;
    return code.value_or(kCudaSuccess);
  }

  CUresult mem_address_reserve(CUdeviceptr* address, size_t size, size_t alignment, CUdeviceptr,
                               unsigned long long) const override {
    MNNVL_FAKE_ENTER_OUT("cuMemAddressReserve", address);
    if (size == 0 || size % kGranularity != 0) return kCudaInvalidValue;
    alignment = std::max(alignment, kGranularity);
    void* wide = mmap(nullptr, size + alignment, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (wide == MAP_FAILED) return kCudaOutOfMemory;
    CUdeviceptr begin = reinterpret_cast<CUdeviceptr>(wide), end = begin + size + alignment;
    *address = (begin + alignment - 1) / alignment * alignment;
    if (*address > begin) munmap(wide, *address - begin);
    if (end > *address + size) munmap(pointer(*address + size), end - *address - size);
    std::lock_guard<std::mutex> lock(world_->mutex);
    world_->reservations[*address] = size;
    return kCudaSuccess;
  }
  CUresult mem_address_free(CUdeviceptr address, size_t size) const override {
    auto code = world_->enter(rank_, "cuMemAddressFree");
    std::lock_guard<std::mutex> lock(world_->mutex);
    auto at = world_->reservations.find(address);
    if (at == world_->reservations.end() || at->second != size || world_->mappings.count(address) != 0)
      return kCudaInvalidValue;
    munmap(pointer(address), size);
    world_->reservations.erase(at);
    return code.value_or(kCudaSuccess);
  }

  CUresult mem_map(CUdeviceptr address, size_t size, size_t offset, CUmemHandle handle,
                   unsigned long long) const override {
    MNNVL_FAKE_ENTER("cuMemMap");
    std::lock_guard<std::mutex> lock(world_->mutex);
    auto range = world_->reservations.find(address);
    auto object = world_->handles.find(handle);
    if (range == world_->reservations.end() || range->second != size || world_->mappings.count(address) != 0)
      return kCudaInvalidValue;
    if (object == world_->handles.end()) return kCudaInvalidHandle;
    if (offset != 0 || size > object->second.size) return kCudaInvalidValue;
    const std::shared_ptr<MulticastState>& multicast = object->second.multicast;
    if (multicast != nullptr) {
      register_multicast_mapping(address, size, multicast);
    } else if (mmap(pointer(address), size, PROT_NONE, MAP_SHARED | MAP_FIXED, object->second.memory->get(), 0) ==
               MAP_FAILED) {
      return kCudaOutOfMemory;
    }
    world_->mappings[address] = {size, multicast != nullptr};
    return kCudaSuccess;
  }
  CUresult mem_unmap(CUdeviceptr address, size_t size) const override {
    auto code = world_->enter(rank_, "cuMemUnmap");
    std::lock_guard<std::mutex> lock(world_->mutex);
    auto at = world_->mappings.find(address);
    if (at == world_->mappings.end() || at->second.size != size) return kCudaInvalidValue;
    if (at->second.multicast) {
      forget_multicast_mapping(address);
    } else {
      mmap(pointer(address), size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
    }
    world_->mappings.erase(at);
    return code.value_or(kCudaSuccess);
  }
  CUresult mem_set_access(CUdeviceptr address, size_t size, const CUmemAccessDesc* desc, size_t count) const override {
    MNNVL_FAKE_ENTER("cuMemSetAccess");
    std::lock_guard<std::mutex> lock(world_->mutex);
    auto at = world_->mappings.find(address);
    if (at == world_->mappings.end() || at->second.size != size || count != 1) return kCudaInvalidValue;
    if (desc->location.id != rank_ || desc->flags != kMemAccessReadWrite) return kCudaInvalidValue;
    if (at->second.multicast) return kCudaSuccess;  // no plain access: device code's double stores through it
    return mprotect(pointer(address), size, PROT_READ | PROT_WRITE) == 0 ? kCudaSuccess : kCudaUnknown;
  }
  CUresult mem_get_allocation_granularity(size_t* granularity, const CUmemAllocationProp*,
                                          CUmemGranularity) const override {
    MNNVL_FAKE_ENTER("cuMemGetAllocationGranularity");
    return *granularity = kGranularity, kCudaSuccess;
  }

  CUresult mem_export_to_shareable_handle(void* shareable, CUmemHandle handle, CUmemHandleType type,
                                          unsigned long long) const override {
    MNNVL_FAKE_ENTER("cuMemExportToShareableHandle");
    std::lock_guard<std::mutex> lock(world_->mutex);
    auto at = world_->handles.find(handle);
    if (at == world_->handles.end()) return kCudaInvalidHandle;
    const Object& object = at->second;  // a multicast object's `memory` is its token
    if (type == kMemHandleFabric) {
      FabricHandle fabric;
      fabric.pid = getpid();
      fabric.fd = object.memory->get();
      fabric.inode = inode_of(fabric.fd);
      fabric.size = object.size;
      fabric.cluster = cluster_number(device_.cluster);
      fabric.clique = device_.clique;
      fabric.multicast = object.multicast != nullptr;
      std::memset(shareable, 0, sizeof(CUmemFabricHandle));
      std::memcpy(shareable, &fabric, sizeof(fabric));
      return kCudaSuccess;
    }
    // As the real driver: without FD_CLOEXEC, which is the caller's to set.
    UniqueFd fd(fcntl(object.memory->get(), F_DUPFD, 3));
    return fd ? (*static_cast<int*>(shareable) = fd.release(), kCudaSuccess) : kCudaOutOfMemory;
  }
  CUresult mem_import_from_shareable_handle(CUmemHandle* handle, void* shareable, CUmemHandleType type) const override {
    MNNVL_FAKE_ENTER_OUT("cuMemImportFromShareableHandle", handle);
    UniqueFd fd;
    if (type == kMemHandleFabric) {
      FabricHandle fabric;
      std::memcpy(&fabric, shareable, sizeof(fabric));
      if (fabric.magic != kFabricMagic) return kCudaInvalidValue;
      // No IMEX domain reaches beyond the clique.
      if (fabric.cluster != cluster_number(device_.cluster) || fabric.clique != device_.clique)
        return kCudaNotPermitted;
      fd = UniqueFd(open(str("/proc/", fabric.pid, "/fd/", fabric.fd).c_str(), O_RDWR | O_CLOEXEC));
      if (!fd || inode_of(fd.get()) != fabric.inode) return kCudaInvalidHandle;  // the exporter has released it
    } else {
      fd = duplicate(static_cast<int>(reinterpret_cast<intptr_t>(shareable)));
      if (!fd) return kCudaInvalidValue;
    }
    std::lock_guard<std::mutex> lock(world_->mutex);
    return import(std::move(fd), handle);
  }

  bool has_multicast() const override { return true; }
  CUresult multicast_create(CUmemHandle* handle, const CUmulticastObjectProp* prop) const override {
    MNNVL_FAKE_ENTER_OUT("cuMulticastCreate", handle);
    if (!device_.multicast) return kCudaNotSupported;
    if (prop->numDevices < 2 || prop->size == 0 || prop->size % kMulticastGranularity != 0) return kCudaInvalidValue;
    Object object;
    object.owner = rank_;
    object.size = prop->size;
    object.memory = share(make_memfd("mnnvl-fake-multicast", 0));
    if (object.memory == nullptr) return kCudaOutOfMemory;
    object.multicast = std::make_shared<MulticastState>();
    object.multicast->device_count = prop->numDevices;
    object.multicast->token = inode_of(object.memory->get());
    object.multicast->lost_rank = world_->multicast_lost_rank();
    std::lock_guard<std::mutex> lock(world_->mutex);
    world_->multicasts[object.multicast->token] = object.multicast;
    *handle = add(std::move(object));
    return kCudaSuccess;
  }
  CUresult multicast_add_device(CUmemHandle multicast, CUdevice device) const override {
    MNNVL_FAKE_ENTER("cuMulticastAddDevice");
    std::lock_guard<std::mutex> lock(world_->mutex);
    MulticastState* state = multicast_of(multicast);
    if (state == nullptr) return kCudaInvalidHandle;
    bool fresh = device == rank_ && state->added.size() < state->device_count && state->added.insert(device_.id).second;
    return fresh ? kCudaSuccess : kCudaInvalidValue;
  }
  CUresult multicast_bind_mem(CUmemHandle multicast, size_t multicast_offset, CUmemHandle memory, size_t memory_offset,
                              size_t size, unsigned long long) const override {
    MNNVL_FAKE_ENTER("cuMulticastBindMem");
    std::lock_guard<std::mutex> lock(world_->mutex);
    MulticastState* state = multicast_of(multicast);
    auto object = world_->handles.find(memory);
    if (state == nullptr || object == world_->handles.end()) return kCudaInvalidHandle;
    if (state->added.size() != state->device_count) return kCudaNotReady;  // the real driver would block here
    if (multicast_offset != 0 || memory_offset != 0 || size % kMulticastGranularity != 0 ||
        object->second.owner != rank_)
      return kCudaInvalidValue;
    state->bound[rank_] = object->second.memory;
    return kCudaSuccess;
  }
  CUresult multicast_unbind(CUmemHandle multicast, CUdevice, size_t, size_t) const override {
    auto code = world_->enter(rank_, "cuMulticastUnbind");
    std::lock_guard<std::mutex> lock(world_->mutex);
    MulticastState* state = multicast_of(multicast);
    if (state == nullptr) return kCudaInvalidHandle;
    state->bound.erase(rank_);
    return code.value_or(kCudaSuccess);
  }
  CUresult multicast_get_granularity(size_t* granularity, const CUmulticastObjectProp*,
                                     CUmemGranularity) const override {
    MNNVL_FAKE_ENTER("cuMulticastGetGranularity");
    return *granularity = kMulticastGranularity, kCudaSuccess;
  }

  CUresult mem_alloc(CUdeviceptr* address, size_t size) const override {
    MNNVL_FAKE_ENTER_OUT("cuMemAlloc", address);
    *address = reinterpret_cast<CUdeviceptr>(std::calloc(1, size));
    std::lock_guard<std::mutex> lock(world_->mutex);
    world_->device_memory.insert(*address);
    return kCudaSuccess;
  }
  CUresult mem_free(CUdeviceptr address) const override {
    auto code = world_->enter(rank_, "cuMemFree");
    std::lock_guard<std::mutex> lock(world_->mutex);
    if (world_->device_memory.erase(address) == 0) return kCudaInvalidValue;
    std::free(pointer(address));
    return code.value_or(kCudaSuccess);
  }
  CUresult memcpy_htod(CUdeviceptr destination, const void* source, size_t size) const override {
    MNNVL_FAKE_ENTER("cuMemcpyHtoD");
    std::memcpy(pointer(destination), source, size);
    return kCudaSuccess;
  }
  CUresult memcpy_dtoh(void* destination, CUdeviceptr source, size_t size) const override {
    MNNVL_FAKE_ENTER("cuMemcpyDtoH");
    std::memcpy(destination, pointer(source), size);
    return kCudaSuccess;
  }
  CUresult stream_create(CUstream* stream, unsigned int) const override {
    MNNVL_FAKE_ENTER_OUT("cuStreamCreate", stream);
    std::lock_guard<std::mutex> lock(world_->mutex);
    *stream = pointer(++world_->next_handle);
    world_->streams[*stream] = {};
    return kCudaSuccess;
  }
  CUresult stream_query(CUstream stream) const override {
    MNNVL_FAKE_ENTER("cuStreamQuery");
    std::lock_guard<std::mutex> lock(world_->mutex);
    auto at = world_->streams.find(stream);
    if (at == world_->streams.end()) return kCudaInvalidHandle;
    return finish_all_gather(&at->second) ? kCudaSuccess : kCudaNotReady;
  }
  CUresult stream_destroy(CUstream stream) const override {
    auto code = world_->enter(rank_, "cuStreamDestroy");
    std::lock_guard<std::mutex> lock(world_->mutex);
    return world_->streams.erase(stream) == 0 ? kCudaInvalidHandle : code.value_or(kCudaSuccess);
  }

  FabricInfo fabric_info(const CUuuid&) const override {
    FabricInfo info;
    info.problem = device_.nvml_problem;
    if (!info.problem.empty()) return info;
    info.state = "completed";
    info.clique = device_.clique;
    uint64_t cluster = cluster_number(device_.cluster);
    std::memcpy(info.cluster_uuid.data(), &cluster, sizeof(cluster));
    if (cluster == 0) info.problem = "the fabric cluster uuid is zero";
    return info;
  }

 private:
  // With the world's mutex held.
  CUmemHandle add(Object object) const {
    CUmemHandle handle = ++world_->next_handle;
    world_->handles[handle] = std::move(object);
    return handle;
  }
  MulticastState* multicast_of(CUmemHandle handle) const {
    auto at = world_->handles.find(handle);
    return at != world_->handles.end() ? at->second.multicast.get() : nullptr;
  }
  CUresult import(UniqueFd fd, CUmemHandle* handle) const {
    struct stat status{};
    if (fstat(fd.get(), &status) != 0) return kCudaInvalidValue;
    Object object;
    object.size = static_cast<size_t>(status.st_size);
    auto multicast = world_->multicasts.find(status.st_ino);
    if (multicast != world_->multicasts.end()) object.multicast = multicast->second.lock();
    auto owner = world_->owners.find(status.st_ino);
    if (owner != world_->owners.end()) object.owner = owner->second;
    if (object.owner >= 0 && !device_.maps_memory_of(world_->device(object.owner))) return kCudaNotSupported;
    object.memory = share(std::move(fd));
    if (object.multicast != nullptr) object.size = SIZE_MAX;  // the token has no size; mem_map's callers know it
    if (const Corruption* wrong = object.multicast == nullptr ? world_->corruption(rank_, object.owner) : nullptr) {
      corrupt(*wrong, &object);
    }
    *handle = add(std::move(object));
    return kCudaSuccess;
  }
  void corrupt(const Corruption& wrong, Object* object) const {
    if (wrong.kind == "misrouted") {
      for (const auto& [rank, memory] : world_->memory_of) {
        if (rank == wrong.owner || rank == rank_) continue;
        if (std::shared_ptr<UniqueFd> other = memory.lock()) {
          object->memory = std::move(other);
          return;
        }
      }
    }
    object->memory = share(make_memfd("mnnvl-fake-lost", object->size));
  }

  const std::shared_ptr<World> world_;
  const int rank_;
  const Device& device_;
};

}  // namespace

std::unique_ptr<CudaDriver> make_driver(std::shared_ptr<World> world, int rank) {
  return std::make_unique<FakeDriver>(std::move(world), rank);
}

}  // namespace mnnvl::fake
