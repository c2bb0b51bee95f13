// One RAII class per driver object. Each releases what it owns in its destructor, which never throws: a driver that
// fails there, or is already shut down at process exit, leaves nothing else to do. Who has to know calls release()
// before: once, and it throws what the driver says; the object owns nothing then. The driver outlives them all.
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
  void release();

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

// Addresses, reserved until destroyed. What is mapped there may come and go, one thing at a time: a launch that was
// captured with these addresses is valid whenever something is.
class AddressRange {
 public:
  AddressRange(const CudaDriver& driver, size_t size, size_t alignment);
  ~AddressRange();
  AddressRange(const AddressRange&) = delete;
  AddressRange& operator=(const AddressRange&) = delete;

  const CudaDriver& driver() const { return driver_; }
  CUdeviceptr address() const { return address_; }
  size_t size() const { return size_; }

 private:
  const CudaDriver& driver_;
  const size_t size_;
  CUdeviceptr address_ = 0;
};

// An allocation mapped in a range, which outlives it, readable and writable by `device`. The allocation may be released
// before the mapping: memory lives as long as it is mapped.
class Mapping {
 public:
  Mapping(const AddressRange& range, int device, const Allocation& allocation);
  void release() { mapped_.release(); }

 private:
  struct Mapped {
    Mapped(const AddressRange& range, const Allocation& allocation);
    ~Mapped();
    Mapped(const Mapped&) = delete;
    Mapped& operator=(const Mapped&) = delete;
    void release();
    const AddressRange* range;  // null: released
  };
  Mapped mapped_;
};

// A device's memory bound into a multicast object, until destroyed.
class MulticastBinding {
 public:
  MulticastBinding(const CudaDriver& driver, int device, const Allocation& multicast, const Allocation& memory,
                   size_t size);
  ~MulticastBinding();
  void release();
  MulticastBinding(const MulticastBinding&) = delete;
  MulticastBinding& operator=(const MulticastBinding&) = delete;

 private:
  const CudaDriver& driver_;
  const CUdevice device_;
  const CUmemHandle multicast_;
  const size_t size_;
  bool bound_ = false;
};

}  // namespace mnnvl
