// The kernels' host side: plain C++, so that transport/ needs no CUDA headers. One table holds everything: a row a
// kernel, and what the host needs of the CUDA runtime. A new kernel is a .cu file, a row here and a line in
// host/table.cu.
#pragma once

#include <cstdint>
#include <optional>

#include "protocol/device_ops.h"
#include "protocol/requests.h"
#include "protocol/workspace.h"

namespace mnnvl::kernels {

struct Launch {
  int threads = 128;
  int cluster = 1;         // blocks of a cluster; divides the blocks
  bool pdl = false;        // programmatic dependent launch: the kernel waits for its predecessor
  void* stream = nullptr;  // cudaStream_t
};

// A two-shot takes the slices window by window, a reduce-scatter the parts: `packs` of each at a time,
// kGenerationWindows of them in a generation; one window may fill a generation alone. The same on every rank.
struct Windows {
  int count = 1;
  uint32_t packs = 0;
};

// numel within the layout's capacity for the algorithm; of a two-shot, its windows are. `blocks`: at most one a
// multiprocessor, so that kernels of several groups fit together; may differ between ranks.
struct AllReduceParams {
  DeviceGroup group;
  const void* in = nullptr;
  void* out = nullptr;  // may equal `in`
  int64_t numel = 0;
  Dtype dtype = Dtype::kFloat32;
  ReduceOp op = ReduceOp::kSum;
  int blocks = 1;
  Windows windows;  // of a two-shot
};

// As a two-shot in windows; `blocks` as above.
struct ReduceScatterParams {
  DeviceGroup group;
  const void* ins[kMaxWorldSize] = {};  // [numel] each: the part of each rank
  void* out = nullptr;  // [numel]; may equal ins[rank]
  int64_t numel = 0;
  Dtype dtype = Dtype::kFloat32;
  ReduceOp op = ReduceOp::kSum;
  int blocks = 1;
  Windows windows;
};

// Some rows of a request, within the layout's capacity; `blocks` as above, but the same on every rank. What all threads
// would reckon alike is here.
struct FusedParams {
  DeviceGroup group;  // of a group of one: rank and world size alone
  const void* in = nullptr;  // at the first of these rows, as are all tensors of `work` but the scales
  int rows = 0;
  int packs = 0;           // of a row
  uint32_t row_bytes = 0;  // of a row of the input
  int cluster_shift = 0;   // a cluster has 2 to this many blocks
  int team_shift = 0;      // a team of a block 2 to this many threads; 0: a row isn't taken by teams
  float inverse_hidden = 0;
  double inverse_hidden_wide = 0;
  RowWork work;
  int64_t first_row = 0;  // of the request's
  bool packed = false;    // every row of every tensor is whole packs and aligned to them; may differ between ranks
  int blocks = 1;
};

// Blocks of one role. Block b serves the lanes b, b + blocks, ... of all, of which number q is lane q / channels of
// channel q % channels; kMaxBlockLanes at most.
struct RoleShape {
  int lanes = 0;  // of a channel: as many as the message with most takes; 0: no messages
  int blocks = 0;
};

struct LocalCopy {
  const void* from = nullptr;
  void* to = nullptr;
  int64_t bytes = 0;
  int blocks = 0;
};

struct ChannelMessage {
  void* data = nullptr;
  int64_t bytes = 0;
  uint64_t call = 0;  // pack(CallDescriptor), and
  int32_t tag = 0;    // its tag: the same at both ends, or the receiver finds a mismatch
  int peer = 0;
};

constexpr int kMaxExchangeThreads = 256;  // a warp that signals, and seven that move data
constexpr int kMaxExchangeMessages = 512;

// Any messages, of any size, in one launch: at most kMaxExchangeMessages. Kernels that send, or receive, on the same
// channels are ordered by the caller; others may run at the same time.
struct ExchangeParams {
  DeviceGroup group;
  ChannelKind kind = ChannelKind::kCollective;
  Operation send_operation = Operation::kSend, receive_operation = Operation::kRecv;  // of failures
  const ChannelMessage* sends = nullptr;
  int send_count = 0;
  const ChannelMessage* receives = nullptr;
  int receive_count = 0;
  RoleShape send_shape, receive_shape;
  LocalCopy copy;
};

// This rank's own values and a message of every peer, reduced in rank order, beside messages to the peers: one each at
// most, at most world_size - 1. Ordered like an exchange on the channels of collectives.
struct ReduceParams {
  DeviceGroup group;
  Operation operation = Operation::kReduce;
  Dtype dtype = Dtype::kFloat32;
  ReduceOp op = ReduceOp::kSum;
  const ChannelMessage* sends = nullptr;
  int send_count = 0;
  RoleShape send_shape;
  const void* own = nullptr;  // [bytes]
  void* out = nullptr;        // [bytes]; may equal `own`; overlaps nothing that is sent
  int64_t bytes = 0;          // of the result here; 0: this rank only sends
  uint64_t call = 0;          // of the peers' messages, as in ChannelMessage
};

// What the host needs of the CUDA runtime.
struct HostFunctions {
  // Set-up: loads every kernel onto `device`, as a lazy load while a peer spins would be a deadlock.
  // Error(kUnsupported) if there is no machine code for it.
  void (*load_all)(int device);
  // Pinned, device-mapped, zeroed host memory; the address is valid on host and device.
  HostMailbox* (*allocate_mailbox)();
  void (*free_mailbox)(HostMailbox* mailbox) noexcept;
  // Waits for all work of the device. False if the context is lost.
  bool (*synchronize_device)(int device) noexcept;
  // A stream that nothing else is on and that doesn't wait for the default stream, of the highest priority. Streams are
  // never destroyed, since torch's allocator may remember them, but given back and taken again.
  void* (*take_stream)(int device);
  void (*give_back_stream)(int device, void* stream);
  // Id of the capture that `stream` is part of, nothing if it isn't capturing. Error(kUnsupported) if its capture has
  // been invalidated: what is enqueued now would neither run nor be captured.
  std::optional<uint64_t> (*capture_id)(void* stream);
  // What `body` asks of the runtime ends no capture of another thread. (A std::function would cost every kernel's file
  // 0.7 s to compile.)
  void (*beside_captures)(void (*body)(void* context), void* context);
};

struct KernelTable {
  // `launch` enqueues on the stream of the current device, never synchronises, may be captured, and throws
  // Error(kSystem) if the launch is refused. `load` loads the code of all instances onto the current device.
  template <typename Params>
  struct Row {
    const char* name;
    void (*launch)(const Params& params, const Launch& shape);
    void (*load)();
  };

  Row<AllReduceParams> oneshot_allreduce;  // Lamport: store to all, reduce locally
  Row<AllReduceParams> twoshot_allreduce;  // Lamport: scatter, reduce, store the result to all
  Row<ReduceScatterParams> reduce_scatter;  // Lamport: the first half of the two-shot
  Row<FusedParams> oneshot_fused;          // Lamport: rows, normalised and quantised; also alone
  Row<FusedParams> twoshot_fused;
  Row<ExchangeParams> exchange;            // pair channels: everything that moves
  Row<ReduceParams> reduce;                // pair channels: every reduction

  HostFunctions host;
  DeviceOps device_ops;       // the probes of the set-up, over real kernels
  const char* architectures;  // "90;100": what the kernels were compiled for
};

// The table; null in a build without nvcc.
const KernelTable* find();
// The table; Error(kUnsupported) with what to do about it in a build without nvcc.
const KernelTable& table();

}  // namespace mnnvl::kernels
