// What the table of kernels is made of beside its rows; the contracts are those of KernelTable.
#pragma once

#include "kernels/host/launch.cuh"

namespace mnnvl::kernels {

// Makes a device current, and the former one again at its end.
class CurrentDevice {
 public:
  explicit CurrentDevice(int device) {
    check(cudaGetDevice(&previous_), "cudaGetDevice");
    check(cudaSetDevice(device), "cudaSetDevice");
  }
  ~CurrentDevice() { (void)cudaSetDevice(previous_); }
  CurrentDevice(const CurrentDevice&) = delete;
  CurrentDevice& operator=(const CurrentDevice&) = delete;

 private:
  int previous_ = 0;
};

// runtime.cu
HostMailbox* allocate_mailbox();
void free_mailbox(HostMailbox* mailbox) noexcept;
bool synchronize_device(int device) noexcept;
void* take_stream(int device);
void give_back_stream(int device, void* stream);
std::optional<uint64_t> capture_id(void* stream);
void beside_captures(void (*body)(void* context), void* context);

// probes.cu
extern const DeviceOps kProbes;
void load_probes();  // onto the current device

}  // namespace mnnvl::kernels
