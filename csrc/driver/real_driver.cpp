#include "driver/cuda_driver.h"
#include "driver/library.h"
#include "driver/nvml.h"

namespace mnnvl {
namespace {

// Every function by its exported name; "_v2" where cuda.h maps the plain name to it. X(member, required, symbols…).
#define MNNVL_DRIVER_FUNCTIONS(X) \
  X(init, true, "cuInit") \
  X(driver_get_version, true, "cuDriverGetVersion") \
  X(get_error_name, true, "cuGetErrorName") \
  X(get_error_string, true, "cuGetErrorString") \
  X(device_get, true, "cuDeviceGet") \
  X(device_get_count, true, "cuDeviceGetCount") \
  X(device_get_name, true, "cuDeviceGetName") \
  X(device_get_uuid, true, "cuDeviceGetUuid_v2", "cuDeviceGetUuid") \
  X(device_get_attribute, true, "cuDeviceGetAttribute") \
  X(ctx_get_device, true, "cuCtxGetDevice") \
  X(mem_create, true, "cuMemCreate") \
  X(mem_release, true, "cuMemRelease") \
  X(mem_address_reserve, true, "cuMemAddressReserve") \
  X(mem_address_free, true, "cuMemAddressFree") \
  X(mem_map, true, "cuMemMap") \
  X(mem_unmap, true, "cuMemUnmap") \
  X(mem_set_access, true, "cuMemSetAccess") \
  X(mem_get_allocation_granularity, true, "cuMemGetAllocationGranularity") \
  X(mem_export_to_shareable_handle, true, "cuMemExportToShareableHandle") \
  X(mem_import_from_shareable_handle, true, "cuMemImportFromShareableHandle") \
  X(multicast_create, false, "cuMulticastCreate") \
  X(multicast_add_device, false, "cuMulticastAddDevice") \
  X(multicast_bind_mem, false, "cuMulticastBindMem") \
  X(multicast_unbind, false, "cuMulticastUnbind") \
  X(multicast_get_granularity, false, "cuMulticastGetGranularity") \
  X(mem_alloc, true, "cuMemAlloc_v2") \
  X(mem_free, true, "cuMemFree_v2") \
  X(memcpy_htod, true, "cuMemcpyHtoD_v2") \
  X(memcpy_dtoh, true, "cuMemcpyDtoH_v2") \
  X(stream_create, true, "cuStreamCreate") \
  X(stream_query, true, "cuStreamQuery") \
  X(stream_destroy, true, "cuStreamDestroy_v2")

// The C signature of a method: the same arguments, no object.
template <typename Method>
struct PlainFunction;
template <typename Result, typename... Args>
struct PlainFunction<Result (CudaDriver::*)(Args...) const> {
  using type = Result(Args...);
};

struct Functions {
#define MNNVL_DECLARE(member, required, ...) PlainFunction<decltype(&CudaDriver::member)>::type* member = nullptr;
  MNNVL_DRIVER_FUNCTIONS(MNNVL_DECLARE)
#undef MNNVL_DECLARE

  explicit Functions(const Library& library) {
    auto resolve = [&](bool required, auto** function, auto... symbols) {
      if (library.resolve(function, symbols...) || !required) return;
      const char* names[] = {symbols...};
      fail(ErrorKind::kUnsupported, "libcuda.so.1 has no ", names[0], ": the NVIDIA driver is too old");
    };
#define MNNVL_RESOLVE(member, required, ...) resolve(required, &member, __VA_ARGS__);
    MNNVL_DRIVER_FUNCTIONS(MNNVL_RESOLVE)
#undef MNNVL_RESOLVE
  }
};

Library open_libcuda() {
  Library library = Library::open("libcuda.so.1");
  if (!library.loaded()) {
    fail(ErrorKind::kUnsupported, "the NVIDIA driver library can't be loaded: ", library.problem(),
         " (is a driver installed, and does the container expose it?)");
  }
  return library;
}

class RealDriver final : public CudaDriver {
 public:
  RealDriver() : f_(open_libcuda()) {
    CUresult code = f_.init(0);
    if (code != kCudaSuccess) fail(ErrorKind::kUnsupported, "cuInit failed: ", describe(*this, code));
  }

  CUresult init(unsigned int flags) const override { return f_.init(flags); }
  CUresult driver_get_version(int* version) const override { return f_.driver_get_version(version); }
  CUresult get_error_name(CUresult code, const char** name) const override { return f_.get_error_name(code, name); }
  CUresult get_error_string(CUresult code, const char** text) const override { return f_.get_error_string(code, text); }

  CUresult device_get(CUdevice* device, int ordinal) const override { return f_.device_get(device, ordinal); }
  CUresult device_get_count(int* count) const override { return f_.device_get_count(count); }
  CUresult device_get_name(char* name, int length, CUdevice device) const override {
    return f_.device_get_name(name, length, device);
  }
  CUresult device_get_uuid(CUuuid* uuid, CUdevice device) const override { return f_.device_get_uuid(uuid, device); }
  CUresult device_get_attribute(int* value, CUdeviceAttribute attribute, CUdevice device) const override {
    return f_.device_get_attribute(value, attribute, device);
  }
  CUresult ctx_get_device(CUdevice* device) const override { return f_.ctx_get_device(device); }

  CUresult mem_create(CUmemHandle* handle, size_t size, const CUmemAllocationProp* prop,
                      unsigned long long flags) const override {
    return f_.mem_create(handle, size, prop, flags);
  }
  CUresult mem_release(CUmemHandle handle) const override { return f_.mem_release(handle); }
  CUresult mem_address_reserve(CUdeviceptr* address, size_t size, size_t alignment, CUdeviceptr hint,
                               unsigned long long flags) const override {
    return f_.mem_address_reserve(address, size, alignment, hint, flags);
  }
  CUresult mem_address_free(CUdeviceptr address, size_t size) const override {
    return f_.mem_address_free(address, size);
  }
  CUresult mem_map(CUdeviceptr address, size_t size, size_t offset, CUmemHandle handle,
                   unsigned long long flags) const override {
    return f_.mem_map(address, size, offset, handle, flags);
  }
  CUresult mem_unmap(CUdeviceptr address, size_t size) const override { return f_.mem_unmap(address, size); }
  CUresult mem_set_access(CUdeviceptr address, size_t size, const CUmemAccessDesc* desc, size_t count) const override {
    return f_.mem_set_access(address, size, desc, count);
  }
  CUresult mem_get_allocation_granularity(size_t* granularity, const CUmemAllocationProp* prop,
                                          CUmemGranularity option) const override {
    return f_.mem_get_allocation_granularity(granularity, prop, option);
  }
  CUresult mem_export_to_shareable_handle(void* shareable, CUmemHandle handle, CUmemHandleType type,
                                          unsigned long long flags) const override {
    return f_.mem_export_to_shareable_handle(shareable, handle, type, flags);
  }
  CUresult mem_import_from_shareable_handle(CUmemHandle* handle, void* shareable, CUmemHandleType type) const override {
    return f_.mem_import_from_shareable_handle(handle, shareable, type);
  }

  bool has_multicast() const override {
    return f_.multicast_create != nullptr && f_.multicast_add_device != nullptr && f_.multicast_bind_mem != nullptr &&
           f_.multicast_unbind != nullptr && f_.multicast_get_granularity != nullptr;
  }
  CUresult multicast_create(CUmemHandle* handle, const CUmulticastObjectProp* prop) const override {
    return has_multicast() ? f_.multicast_create(handle, prop) : kCudaNotSupported;
  }
  CUresult multicast_add_device(CUmemHandle multicast, CUdevice device) const override {
    return has_multicast() ? f_.multicast_add_device(multicast, device) : kCudaNotSupported;
  }
  CUresult multicast_bind_mem(CUmemHandle multicast, size_t multicast_offset, CUmemHandle memory, size_t memory_offset,
                              size_t size, unsigned long long flags) const override {
    return has_multicast() ? f_.multicast_bind_mem(multicast, multicast_offset, memory, memory_offset, size, flags)
                           : kCudaNotSupported;
  }
  CUresult multicast_unbind(CUmemHandle multicast, CUdevice device, size_t offset, size_t size) const override {
    return has_multicast() ? f_.multicast_unbind(multicast, device, offset, size) : kCudaNotSupported;
  }
  CUresult multicast_get_granularity(size_t* granularity, const CUmulticastObjectProp* prop,
                                     CUmemGranularity option) const override {
    return has_multicast() ? f_.multicast_get_granularity(granularity, prop, option) : kCudaNotSupported;
  }

  CUresult mem_alloc(CUdeviceptr* address, size_t size) const override { return f_.mem_alloc(address, size); }
  CUresult mem_free(CUdeviceptr address) const override { return f_.mem_free(address); }
  CUresult memcpy_htod(CUdeviceptr destination, const void* source, size_t size) const override {
    return f_.memcpy_htod(destination, source, size);
  }
  CUresult memcpy_dtoh(void* destination, CUdeviceptr source, size_t size) const override {
    return f_.memcpy_dtoh(destination, source, size);
  }
  CUresult stream_create(CUstream* stream, unsigned int flags) const override {
    return f_.stream_create(stream, flags);
  }
  CUresult stream_query(CUstream stream) const override { return f_.stream_query(stream); }
  CUresult stream_destroy(CUstream stream) const override { return f_.stream_destroy(stream); }

  FabricInfo fabric_info(const CUuuid& uuid) const override { return nvml_fabric_info(uuid); }

 private:
  Functions f_;
};

}  // namespace

const CudaDriver& real_driver() {
  // Leaked on purpose: buffers may be released during static destruction. A constructor that throws is tried again at
  // the next call and fails the same way.
  static const RealDriver* driver = new RealDriver;
  return *driver;
}

std::string describe(const CudaDriver& driver, CUresult code) {
  const char* name = nullptr;
  const char* text = nullptr;
  driver.get_error_name(code, &name);
  driver.get_error_string(code, &text);
  return str(name != nullptr ? name : "unknown CUDA error", " (", code, text != nullptr ? ": " : "",
             text != nullptr ? text : "", ")");
}

}  // namespace mnnvl
