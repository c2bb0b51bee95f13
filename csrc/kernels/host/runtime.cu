// What the host side needs of the CUDA runtime.
#include "kernels/host/runtime.cuh"

#include <cstring>
#include <map>
#include <mutex>
#include <vector>

#include "common/error.h"

namespace mnnvl::kernels {

void fail_cuda(cudaError_t result, const char* what) {
  (void)cudaGetLastError();  // or the next launch would report it again
  fail(ErrorKind::kSystem, what, ": ", cudaGetErrorString(result));
}

void fail_no_code() {
  (void)cudaGetLastError();
  fail(ErrorKind::kUnsupported,
       "mnnvl was built for " MNNVL_ARCHITECTURES
       ", which this GPU can't run; rebuild with MNNVL_CUDA_ARCHS set to its compute capability");
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
  if (!ok) (void)cudaGetLastError();  // or somebody else's next launch would report it
  (void)cudaSetDevice(previous);
  return ok;
}

namespace {

struct FreeStreams {
  std::mutex mutex;
  std::map<int, std::vector<void*>> of_device;

  static FreeStreams& get() {
    static auto* streams = new FreeStreams;  // outlives everything
    return *streams;
  }
};

}  // namespace

void* take_stream(int device) {
  FreeStreams& free = FreeStreams::get();
  std::lock_guard<std::mutex> lock(free.mutex);
  std::vector<void*>& streams = free.of_device[device];
  if (streams.empty()) {
    const CurrentDevice current(device);
    int least = 0, greatest = 0;
    cudaStream_t stream = nullptr;
    check(cudaDeviceGetStreamPriorityRange(&least, &greatest), "cudaDeviceGetStreamPriorityRange");
    check(cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, greatest), "cudaStreamCreateWithPriority");
    return stream;
  }
  void* stream = streams.back();
  streams.pop_back();
  return stream;
}

void give_back_stream(int device, void* stream) {
  FreeStreams& free = FreeStreams::get();
  std::lock_guard<std::mutex> lock(free.mutex);
  free.of_device[device].push_back(stream);
}

std::optional<uint64_t> capture_id(void* stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long id = 0;
  check(cudaStreamGetCaptureInfo(static_cast<cudaStream_t>(stream), &status, &id), "cudaStreamGetCaptureInfo");
  switch (status) {
    case cudaStreamCaptureStatusNone: return std::nullopt;
    case cudaStreamCaptureStatusActive: return id;
    case cudaStreamCaptureStatusInvalidated: break;
  }
  fail(ErrorKind::kUnsupported,
       "mnnvl: the CUDA graph capture on the current stream has been invalidated by an earlier operation that may not "
       "be captured (a synchronisation, or a call on another stream that was not forked from the capturing one): end "
       "the capture, take that operation out of it and capture again; nothing was enqueued");
}

void beside_captures(void (*body)(void* context), void* context) {
  struct Relaxed {
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    Relaxed() { check(cudaThreadExchangeStreamCaptureMode(&mode), "cudaThreadExchangeStreamCaptureMode"); }
    ~Relaxed() { (void)cudaThreadExchangeStreamCaptureMode(&mode); }
  };
  const Relaxed relaxed;
  body(context);
}

}  // namespace mnnvl::kernels
