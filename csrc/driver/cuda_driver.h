// libcuda as an abstract table: the real one is loaded at run time (real_driver.cpp), the test double is
// fake_driver.h. Methods are named after the driver's functions, take what those take and return their result codes;
// none throws. Every method may be called from any thread.
#pragma once

#include <array>
#include <cstdint>
#include <string>

#include "common/error.h"
#include "driver/cuda_types.h"

namespace mnnvl {

// What NVML says about a device's place in an NVLink fabric.
struct FabricInfo {
  std::array<unsigned char, 16> cluster_uuid{};  // all zero: in no cluster
  uint32_t clique = 0;
  std::string state;    // "completed", "not supported", "not started", "in progress"; empty when unknown
  std::string problem;  // why there is no fabric, empty when there is one
  bool joined() const { return problem.empty(); }
};

class CudaDriver {
 public:
  virtual ~CudaDriver() = default;

  virtual CUresult init(unsigned int flags) const = 0;
  virtual CUresult driver_get_version(int* version) const = 0;
  virtual CUresult get_error_name(CUresult code, const char** name) const = 0;
  virtual CUresult get_error_string(CUresult code, const char** text) const = 0;

  virtual CUresult device_get(CUdevice* device, int ordinal) const = 0;
  virtual CUresult device_get_count(int* count) const = 0;
  virtual CUresult device_get_name(char* name, int length, CUdevice device) const = 0;
  virtual CUresult device_get_uuid(CUuuid* uuid, CUdevice device) const = 0;
  virtual CUresult device_get_attribute(int* value, CUdeviceAttribute attribute, CUdevice device) const = 0;
  virtual CUresult ctx_get_device(CUdevice* device) const = 0;  // of the context current on this thread

  virtual CUresult mem_create(CUmemHandle* handle, size_t size, const CUmemAllocationProp* prop,
                              unsigned long long flags) const = 0;
  virtual CUresult mem_release(CUmemHandle handle) const = 0;
  virtual CUresult mem_address_reserve(CUdeviceptr* address, size_t size, size_t alignment, CUdeviceptr hint,
                                       unsigned long long flags) const = 0;
  virtual CUresult mem_address_free(CUdeviceptr address, size_t size) const = 0;
  virtual CUresult mem_map(CUdeviceptr address, size_t size, size_t offset, CUmemHandle handle,
                           unsigned long long flags) const = 0;
  virtual CUresult mem_unmap(CUdeviceptr address, size_t size) const = 0;
  virtual CUresult mem_set_access(CUdeviceptr address, size_t size, const CUmemAccessDesc* desc,
                                  size_t count) const = 0;
  virtual CUresult mem_get_allocation_granularity(size_t* granularity, const CUmemAllocationProp* prop,
                                                  CUmemGranularity option) const = 0;
  virtual CUresult mem_export_to_shareable_handle(void* shareable, CUmemHandle handle, CUmemHandleType type,
                                                  unsigned long long flags) const = 0;
  virtual CUresult mem_import_from_shareable_handle(CUmemHandle* handle, void* shareable,
                                                    CUmemHandleType type) const = 0;

  // False where libcuda is too old for multicast; the five below then return kCudaNotSupported.
  virtual bool has_multicast() const = 0;
  virtual CUresult multicast_create(CUmemHandle* handle, const CUmulticastObjectProp* prop) const = 0;
  virtual CUresult multicast_add_device(CUmemHandle multicast, CUdevice device) const = 0;
  virtual CUresult multicast_bind_mem(CUmemHandle multicast, size_t multicast_offset, CUmemHandle memory,
                                      size_t memory_offset, size_t size, unsigned long long flags) const = 0;
  virtual CUresult multicast_unbind(CUmemHandle multicast, CUdevice device, size_t offset, size_t size) const = 0;
  virtual CUresult multicast_get_granularity(size_t* granularity, const CUmulticastObjectProp* prop,
                                             CUmemGranularity option) const = 0;

  // Only for the exchange of handles over NCCL, which moves device memory.
  virtual CUresult mem_alloc(CUdeviceptr* address, size_t size) const = 0;
  virtual CUresult mem_free(CUdeviceptr address) const = 0;
  virtual CUresult memcpy_htod(CUdeviceptr destination, const void* source, size_t size) const = 0;
  virtual CUresult memcpy_dtoh(void* destination, CUdeviceptr source, size_t size) const = 0;
  virtual CUresult stream_create(CUstream* stream, unsigned int flags) const = 0;
  virtual CUresult stream_query(CUstream stream) const = 0;
  virtual CUresult stream_destroy(CUstream stream) const = 0;

  // From NVML, by the device's uuid. Never fails: no library, no function or no fabric is a `problem`.
  virtual FabricInfo fabric_info(const CUuuid& uuid) const = 0;
};

// The process's libcuda, loaded at the first call and never unloaded. Throws Error(kUnsupported) when it can't be
// loaded, lacks a function that set-up needs, or cuInit fails; the same error at every later call.
const CudaDriver& real_driver();

// "CUDA_ERROR_OUT_OF_MEMORY (2: out of memory)".
std::string describe(const CudaDriver& driver, CUresult code);

// Throws Error(kSystem, "cuMemCreate of 64 bytes on device 0 failed: CUDA_ERROR_…") unless `code` is success.
// `function` is the driver's own name; the rest says on what.
template <typename... Args>
void check(const CudaDriver& driver, CUresult code, const char* function, const Args&... what) {
  if (code != kCudaSuccess) fail(ErrorKind::kSystem, function, what..., " failed: ", describe(driver, code));
}

}  // namespace mnnvl
