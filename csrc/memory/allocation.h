// One RAII class per driver object. Each releases what it owns in its destructor, which never throws: a driver that
// fails there, or is already shut down at process exit, leaves nothing else to do. The driver outlives them all.
#pragma once

#include <memory>

#include "driver/cuda_driver.h"
#include "memory/options.h"
#include "system/unique_fd.h"

namespace mnnvl {

CUmemHandleType driver_handle_type(HandleType type);
CUmemAllocationProp allocation_prop(int device, HandleType type);
size_t allocation_granularity(const CudaDriver& driver, int device, HandleType type);

// A reference to physical memory, or to a multicast object: made here, or imported from a peer.
class Allocation {
 public:
  Allocation() = default;
  static Allocation create(const CudaDriver& driver, int device, HandleType type, size_t size);
  // The only call in this package that creates a multicast object. The caller has looked whether one may be created.
  static Allocation create_multicast(const CudaDriver& driver, HandleType type, size_t size, int world_size);
  static Allocation import_fabric(const CudaDriver& driver, const CUmemFabricHandle& handle);
  static Allocation import_fd(const CudaDriver& driver, int fd);  // which stays the caller's

  Allocation(Allocation&& other) noexcept { swap(other); }
  Allocation& operator=(Allocation&& other) noexcept {
    swap(other);
    return *this;
  }
  ~Allocation();

  CUmemFabricHandle export_fabric() const;
  UniqueFd export_fd() const;  // closed on exec

  CUmemHandle handle() const { return handle_; }
  explicit operator bool() const { return driver_ != nullptr; }

 private:
  Allocation(const CudaDriver& driver, CUmemHandle handle) : driver_(&driver), handle_(handle) {}
  void swap(Allocation& other) {
    std::swap(driver_, other.driver_);
    std::swap(handle_, other.handle_);
  }

  const CudaDriver* driver_ = nullptr;
  CUmemHandle handle_ = 0;
};

// An allocation mapped, readable and writable by `device`, at addresses of its own. The allocation may be released
// before the mapping: memory lives as long as it is mapped.
class Mapping {
 public:
  Mapping(const CudaDriver& driver, int device, const Allocation& allocation, size_t size, size_t alignment);
  ~Mapping();
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;

  CUdeviceptr address() const { return range_.address; }

 private:
  struct Range {
    Range(const CudaDriver& driver, size_t size, size_t alignment);
    ~Range();
    const CudaDriver& driver;
    const size_t size;
    CUdeviceptr address = 0;
  };
  struct Mapped {
    Mapped(const Range& range, const Allocation& allocation);
    ~Mapped();
    const Range& range;
  };
  const Range range_;
  const Mapped mapped_;
};

// A device's memory bound into a multicast object, until destroyed.
class MulticastBinding {
 public:
  MulticastBinding(const CudaDriver& driver, int device, const Allocation& multicast, const Allocation& memory,
                   size_t size);
  ~MulticastBinding();
  MulticastBinding(const MulticastBinding&) = delete;
  MulticastBinding& operator=(const MulticastBinding&) = delete;

 private:
  const CudaDriver& driver_;
  const CUdevice device_;
  const CUmemHandle multicast_;
  const size_t size_;
};

}  // namespace mnnvl
