// What the host side needs of the CUDA runtime, and the kernels that the set-up probes memory with.
#include <cstring>
#include <mutex>
#include <set>

#include "kernels/host/launch.cuh"
#include "kernels/device/memory_order.cuh"

#ifndef MNNVL_ARCHITECTURES
#define MNNVL_ARCHITECTURES "unknown"
#endif

namespace mnnvl::kernels {
namespace {

constexpr int kProbeWords = 512;  // that a probe kernel takes by value
struct ProbeWords {
  uint32_t words[kProbeWords];
};

__global__ void fill_kernel(uint32_t* to, uint32_t value, size_t count) {
  for (size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += size_t(gridDim.x) * blockDim.x) {
    to[i] = value;
  }
}

// Multicast stores carry 16 bytes: count is a multiple of 4.
__global__ void multicast_store_kernel(uint4* to, const __grid_constant__ ProbeWords source, int packs) {
  const uint4* words = reinterpret_cast<const uint4*>(source.words);
  for (int i = threadIdx.x; i < packs; i += blockDim.x) multimem_st_relaxed_sys_v4(to + i, words[i]);
}

class DeviceScope {
 public:
  explicit DeviceScope(int device) {
    check(cudaGetDevice(&previous_), "cudaGetDevice");
    check(cudaSetDevice(device), "cudaSetDevice");
    check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreate");
  }
  ~DeviceScope() {
    (void)cudaStreamDestroy(stream_);
    (void)cudaSetDevice(previous_);
  }
  cudaStream_t stream() const { return stream_; }
  void finish() { check(cudaStreamSynchronize(stream_), "a probe of the workspace failed"); }

 private:
  int previous_ = 0;
  cudaStream_t stream_ = nullptr;
};

void store_words(int device, uint64_t address, const uint32_t* words, size_t count, bool multicast) {
  DeviceScope scope(device);
  if (!multicast) {
    check(cudaMemcpyAsync(reinterpret_cast<void*>(address), words, count * 4, cudaMemcpyHostToDevice, scope.stream()),
          "cannot write to a peer's memory");
  } else {
    if (count % 4 != 0 || count > kProbeWords)
      fail(ErrorKind::kInvalidArgument, "multicast probe of ", count, " words");
    ProbeWords source{};
    std::memcpy(source.words, words, count * 4);
    multicast_store_kernel<<<1, 32, 0, scope.stream()>>>(reinterpret_cast<uint4*>(address), source, int(count / 4));
    check(cudaGetLastError(), "multicast probe");
  }
  scope.finish();
}

void fill_words(int device, uint64_t address, uint32_t value, size_t count) {
  DeviceScope scope(device);
  fill_kernel<<<256, 512, 0, scope.stream()>>>(reinterpret_cast<uint32_t*>(address), value, count);
  check(cudaGetLastError(), "workspace fill");
  scope.finish();
}

void load_words(int device, uint64_t address, uint32_t* words, size_t count) {
  DeviceScope scope(device);
  check(
      cudaMemcpyAsync(words, reinterpret_cast<const void*>(address), count * 4, cudaMemcpyDeviceToHost, scope.stream()),
      "cannot read the workspace");
  scope.finish();
}

}  // namespace

bool available() { return true; }
const char* architectures() { return MNNVL_ARCHITECTURES; }

void load_all(int device) {
  DeviceScope scope(device);
  static std::mutex mutex;
  static std::set<int> loaded;
  std::lock_guard<std::mutex> lock(mutex);
  if (loaded.count(device) != 0) return;
  load_oneshot_lamport();
  load_twoshot_lamport();
  load_epoch_gather();
  load(fill_kernel);
  load(multicast_store_kernel);
  loaded.insert(device);
}

HostMailbox* allocate_mailbox() {
  void* mailbox = nullptr;
  check(cudaHostAlloc(&mailbox, sizeof(HostMailbox), cudaHostAllocMapped | cudaHostAllocPortable), "cudaHostAlloc");
  std::memset(mailbox, 0, sizeof(HostMailbox));
  return static_cast<HostMailbox*>(mailbox);
}

void free_mailbox(HostMailbox* mailbox) noexcept { (void)cudaFreeHost(mailbox); }

bool synchronize_device(int device) noexcept {
  int previous = 0;
  if (cudaGetDevice(&previous) != cudaSuccess || cudaSetDevice(device) != cudaSuccess) return false;
  const bool ok = cudaDeviceSynchronize() == cudaSuccess;
  (void)cudaSetDevice(previous);
  return ok;
}

std::optional<uint64_t> capture_id(void* stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long id = 0;
  check(cudaStreamGetCaptureInfo(static_cast<cudaStream_t>(stream), &status, &id), "cudaStreamGetCaptureInfo");
  if (status != cudaStreamCaptureStatusActive) return std::nullopt;
  return id;
}

const DeviceOps& device_ops() {
  static const DeviceOps ops{store_words, fill_words, load_words};
  return ops;
}

}  // namespace mnnvl::kernels
