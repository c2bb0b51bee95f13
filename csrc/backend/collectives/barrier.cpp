#include <c10/core/impl/VirtualGuardImpl.h>

#include "backend/collectives/collectives.h"
#include "kernels/kernels.h"

namespace mnnvl::collectives {
namespace {

// Whether a group of this process can have a CUDA side at all. Without one, torch's and its users' habit of naming a
// GPU for the barrier (device_ids=[local_rank]) means the group's CPU barrier.
bool cuda_possible() {
  if (kernels::find() == nullptr || !c10::impl::hasDeviceGuardImpl(at::kCUDA)) return false;
  return c10::impl::VirtualGuardImpl(at::kCUDA).deviceCount() > 0;
}

at::Device choose_device(std::optional<at::Device> bound, const c10d::BarrierOptions& options) {
  if (!cuda_possible()) return at::kCPU;
  if (options.device && (!options.device->is_cuda() || options.device->has_index())) return *options.device;
  if (!options.device_ids.empty()) return at::Device(at::kCUDA, at::DeviceIndex(options.device_ids[0]));
  if (bound) return *bound;
  // torch asks for "cuda" without an index where nobody bound a device.
  return options.device ? c10::impl::VirtualGuardImpl(options.device->type()).getDevice() : at::Device(at::kCPU);
}

}  // namespace

Call barrier(GroupView group, std::optional<at::Device> bound, const c10d::BarrierOptions& options) {
  Call call = make_call(c10d::OpType::BARRIER, "mnnvl:barrier", choose_device(bound, options), options);
  if (group.size == 1) return call;
  call.body = [](Transport& transport, const Run& run) { transport.run(BarrierRequest{}, run); };
  return call;
}

}  // namespace mnnvl::collectives
