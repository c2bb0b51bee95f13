// From run-time dtype and world size to template instances, and the one place that launches.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "kernels/device/pack.cuh"
#include "kernels/kernels.h"

#ifndef MNNVL_ARCHITECTURES
#define MNNVL_ARCHITECTURES "unknown"
#endif

namespace mnnvl::kernels {

constexpr int kMinBlocks = 2;  // so that a multiprocessor has room for the kernels of two groups

// runtime.cu: Errors are made there, so that no kernel's file has to compile what makes their texts.
[[noreturn]] void fail_cuda(cudaError_t result, const char* what);
[[noreturn]] void fail_no_code();

inline void check(cudaError_t result, const char* what) {
  if (result != cudaSuccess) fail_cuda(result, what);
}

// One instance for each world size up to kMaxFastWorldSize; 0 is the loop for larger ones. `X(T, world)`.
#define MNNVL_FOR_EACH_WORLD(X, T) X(T, 2) X(T, 3) X(T, 4) X(T, 5) X(T, 6) X(T, 7) X(T, 8) X(T, 0)
#define MNNVL_FOR_EACH_INSTANCE(X) \
  MNNVL_FOR_EACH_WORLD(X, float) \
  MNNVL_FOR_EACH_WORLD(X, __half) \
  MNNVL_FOR_EACH_WORLD(X, __nv_bfloat16)

template <typename T>
constexpr Dtype dtype_of() {
  return sizeof(T) == 4 ? Dtype::kFloat32 : std::is_same<T, __half>::value ? Dtype::kFloat16 : Dtype::kBFloat16;
}

constexpr int threads_of(int instance) { return max_all_reduce_threads(instance == 0 ? kMaxWorldSize : instance); }
// Of a block that has a multiprocessor to itself.
constexpr int whole_threads_of(int instance) { return kMinBlocks * threads_of(instance); }

constexpr int instance_of(int world_size) { return world_size <= kMaxFastWorldSize ? world_size : 0; }

template <typename Params>
void launch(void (*kernel)(Params), const Params& params, int64_t blocks, const Launch& shape) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(shape.threads));
  config.stream = static_cast<cudaStream_t>(shape.stream);
  cudaLaunchAttribute attributes[2]{};
  config.attrs = attributes;
  if (shape.pdl) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  }
  if (shape.cluster > 1) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {static_cast<unsigned>(shape.cluster), 1, 1};
  }
  check(cudaLaunchKernelEx(&config, kernel, params), "cannot launch a kernel of mnnvl");
}

// Loads a kernel's code onto the current device.
template <typename Kernel>
void load(Kernel kernel) {
  cudaFuncAttributes attributes{};
  const cudaError_t result = cudaFuncGetAttributes(&attributes, kernel);
  if (result == cudaErrorNoKernelImageForDevice || result == cudaErrorInvalidDeviceFunction) fail_no_code();
  check(result, "cannot load a kernel of mnnvl");
}

}  // namespace mnnvl::kernels
