// The kernels' host side: plain C++, so that backend/ needs no CUDA headers. Every launch_* enqueues on `stream` of the
// current device, never synchronises, may be captured, and throws Error(kSystem) if the launch is refused.
#pragma once

#include <cstdint>
#include <optional>

#include "protocol/device_ops.h"
#include "protocol/workspace.h"

namespace mnnvl::kernels {

// True when the module was built with kernels; without them every function here throws Error(kUnsupported).
bool available();
// "sm_90 sm_100": what the kernels were compiled for.
const char* architectures();

struct Launch {
  int threads = 128;
  bool pdl = false;  // programmatic dependent launch: the kernel waits for its predecessor before shared state
  void* stream = nullptr;  // cudaStream_t
};

// Most threads a block of the all-reduce kernels: those for larger worlds need more registers each.
MNNVL_HOST_DEVICE constexpr int max_all_reduce_threads(int world_size) { return world_size <= 5 ? 512 : 256; }

struct AllReduceParams {
  DeviceGroup group;
  const void* in = nullptr;
  void* out = nullptr;  // may equal `in`
  int64_t numel = 0;
  Dtype dtype = Dtype::kFloat32;
  ReduceOp op = ReduceOp::kSum;
  int blocks =
      1;  // the same on every rank; at most one a multiprocessor, so that kernels of several groups fit together
};

// Lamport protocols: numel within the layout's capacity for the algorithm.
void launch_oneshot_lamport_allreduce(const AllReduceParams& params, const Launch& launch);
void launch_twoshot_lamport_allreduce(const AllReduceParams& params, const Launch& launch);

constexpr int kMaxGatherThreads = 256;

struct GatherParams {
  DeviceGroup group;
  const void* in = nullptr;  // this rank's contribution; unused where `source` is another rank
  void* outs[kMaxWorldSize] = {};  // where each rank's contribution goes here; null: not wanted
  int64_t bytes = 0;  // per contribution
  int source = -1;  // -1: every rank contributes (all_gather); r: rank r alone (broadcast)
  Operation operation = Operation::kAllGather;
  int blocks = 1;
};

// Epoch protocol, any size in one launch; bytes == 0 is a barrier. `blocks` <= kPipeBlocks and the same on every rank.
void launch_epoch_gather(const GatherParams& params, const Launch& launch);

// Set-up: loads every kernel onto `device` (a lazy load while a peer spins would be a deadlock); throws Error(kUnsupported)
// if there is no machine code for it.
void load_all(int device);

// Pinned, device-mapped, zeroed host memory; address valid on host and device.
HostMailbox* allocate_mailbox();
void free_mailbox(HostMailbox* mailbox) noexcept;
// Waits for all work of the device. False if the context is lost.
bool synchronize_device(int device) noexcept;
// Id of the capture that `stream` is part of, or nothing if it isn't capturing.
std::optional<uint64_t> capture_id(void* stream);

// The probes of the set-up, over real kernels.
const DeviceOps& device_ops();

}  // namespace mnnvl::kernels
