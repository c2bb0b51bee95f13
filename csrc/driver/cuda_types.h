// The driver's types that set-up needs, declared here so that the package builds without a CUDA toolkit. Layouts and
// values are those of cuda.h (12.1 and newer, unchanged in 13); the asserts hold their sizes in place.
#pragma once

#include <cstddef>
#include <cstdint>

namespace mnnvl {

using CUresult = int;
using CUdevice = int;
using CUdeviceptr = uint64_t;
using CUmemHandle = uint64_t;  // CUmemGenericAllocationHandle
using CUstream = void*;

enum : CUresult {
  kCudaSuccess = 0,
  kCudaInvalidValue = 1,
  kCudaOutOfMemory = 2,
  kCudaDeinitialized = 4,
  kCudaInvalidDevice = 101,
  kCudaInvalidHandle = 400,
  kCudaNotReady = 600,
  kCudaNotPermitted = 800,
  kCudaNotSupported = 801,
  kCudaUnknown = 999,
};

enum CUdeviceAttribute : int {
  kAttributeMultiprocessorCount = 16,
  kAttributeComputeCapabilityMajor = 75,
  kAttributeComputeCapabilityMinor = 76,
  kAttributeVirtualMemoryManagement = 102,
  kAttributePosixFdHandles = 103,
  kAttributeFabricHandles = 128,
  kAttributeMulticast = 132,
};

enum CUmemHandleType : int { kMemHandleNone = 0, kMemHandlePosixFd = 1, kMemHandleFabric = 8 };
enum CUmemAllocationType : int { kMemAllocationPinned = 1 };
enum CUmemLocationType : int { kMemLocationDevice = 1 };
enum CUmemAccessFlags : int { kMemAccessReadWrite = 3 };
enum CUmemGranularity : int { kGranularityMinimum = 0, kGranularityRecommended = 1 };

struct CUuuid {
  unsigned char bytes[16];
};

struct CUmemLocation {
  CUmemLocationType type;
  int id;
};

struct CUmemAllocationProp {
  CUmemAllocationType type;
  CUmemHandleType requestedHandleTypes;
  CUmemLocation location;
  void* win32HandleMetaData;
  struct {
    unsigned char compressionType;
    unsigned char gpuDirectRDMACapable;
    unsigned short usage;
    unsigned char reserved[4];
  } allocFlags;
};

struct CUmemAccessDesc {
  CUmemLocation location;
  CUmemAccessFlags flags;
};

struct CUmulticastObjectProp {
  unsigned int numDevices;
  size_t size;
  unsigned long long handleTypes;
  unsigned long long flags;
};

struct CUmemFabricHandle {
  unsigned char data[64];
};

static_assert(sizeof(CUuuid) == 16);
static_assert(sizeof(CUmemAllocationProp) == 32 && offsetof(CUmemAllocationProp, win32HandleMetaData) == 16 &&
              offsetof(CUmemAllocationProp, allocFlags) == 24);
static_assert(sizeof(CUmemAccessDesc) == 12 && offsetof(CUmemAccessDesc, flags) == 8);
static_assert(sizeof(CUmulticastObjectProp) == 32 && offsetof(CUmulticastObjectProp, size) == 8 &&
              offsetof(CUmulticastObjectProp, handleTypes) == 16);
static_assert(sizeof(CUmemFabricHandle) == 64);

}  // namespace mnnvl
