// Stands in for the kernels in a build without nvcc.
#include "common/error.h"
#include "kernels/kernels.h"

#if !MNNVL_WITH_CUDA

namespace mnnvl::kernels {
namespace {
[[noreturn]] void refuse() {
  fail(ErrorKind::kUnsupported,
       "mnnvl was built without CUDA kernels (no nvcc was found); install a CUDA toolkit or the nvidia-cuda-nvcc wheel "
       "and "
       "rebuild to use CUDA tensors");
}
}  // namespace

bool available() { return false; }
const char* architectures() { return ""; }
void launch_oneshot_lamport_allreduce(const AllReduceParams&, const Launch&) { refuse(); }
void launch_twoshot_lamport_allreduce(const AllReduceParams&, const Launch&) { refuse(); }
void launch_epoch_gather(const GatherParams&, const Launch&) { refuse(); }
void load_all(int) { refuse(); }
HostMailbox* allocate_mailbox() { refuse(); }
void free_mailbox(HostMailbox*) noexcept {}
bool synchronize_device(int) noexcept { return false; }
std::optional<uint64_t> capture_id(void*) { return std::nullopt; }
const DeviceOps& device_ops() { refuse(); }

}  // namespace mnnvl::kernels

#endif
