// The kernels and copies that the set-up probes memory with.
#include <cstring>

#include "common/error.h"
#include "kernels/device/memory_order.cuh"
#include "kernels/host/runtime.cuh"

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

// A stream of its own on a device, so that a probe waits for nothing of the user's.
class ProbeStream {
 public:
  explicit ProbeStream(int device) : current_(device) {
    check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreate");
  }
  ~ProbeStream() { (void)cudaStreamDestroy(stream_); }
  ProbeStream(const ProbeStream&) = delete;
  ProbeStream& operator=(const ProbeStream&) = delete;

  cudaStream_t get() const { return stream_; }
  void finish() { check(cudaStreamSynchronize(stream_), "a probe of the workspace failed"); }

 private:
  CurrentDevice current_;
  cudaStream_t stream_ = nullptr;
};

void store_words(int device, uint64_t address, const uint32_t* words, size_t count, bool multicast) {
  ProbeStream stream(device);
  if (!multicast) {
    check(cudaMemcpyAsync(reinterpret_cast<void*>(address), words, count * 4, cudaMemcpyHostToDevice, stream.get()),
          "cannot write to a peer's memory");
  } else {
    if (count % 4 != 0 || count > kProbeWords) {
      fail(ErrorKind::kInvalidArgument, "multicast probe of ", count, " words");
    }
    ProbeWords source{};
    std::memcpy(source.words, words, count * 4);
    multicast_store_kernel<<<1, 32, 0, stream.get()>>>(reinterpret_cast<uint4*>(address), source, int(count / 4));
    check(cudaGetLastError(), "multicast probe");
  }
  stream.finish();
}

void fill_words(int device, uint64_t address, uint32_t value, size_t count) {
  ProbeStream stream(device);
  fill_kernel<<<256, 512, 0, stream.get()>>>(reinterpret_cast<uint32_t*>(address), value, count);
  check(cudaGetLastError(), "workspace fill");
  stream.finish();
}

void load_words(int device, uint64_t address, uint32_t* words, size_t count) {
  ProbeStream stream(device);
  check(cudaMemcpyAsync(words, reinterpret_cast<const void*>(address), count * 4, cudaMemcpyDeviceToHost, stream.get()),
        "cannot read the workspace");
  stream.finish();
}

}  // namespace

constexpr DeviceOps kProbes{store_words, fill_words, load_words};

void load_probes() {
  load(fill_kernel);
  load(multicast_store_kernel);
}

}  // namespace mnnvl::kernels
