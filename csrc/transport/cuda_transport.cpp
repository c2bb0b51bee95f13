#include <c10/util/Logging.h>

#include <atomic>
#include <mutex>
#include <optional>
#include <vector>

#include "tuning/choose.h"
#include "backend/errors.h"
#include "transport/transport.h"
#include "transport/watchdog.h"
#include "bootstrap/agreement.h"
#include "common/error.h"
#include "driver/cuda_driver.h"
#include "driver/nccl.h"
#include "kernels/kernels.h"

namespace mnnvl {
namespace {

constexpr int64_t kDefaultWorkspaceBytes = int64_t{64} << 20;
constexpr int64_t kMinWorkspaceBytes = int64_t{1} << 20;
constexpr int kMinComputeCapability = 90;  // multimem and griddepcontrol

WorkspaceLayout layout_for(const TransportOptions& options, int world_size) {
  if (options.stage_bytes > 0) return WorkspaceLayout::make(options.stage_bytes, /*pipe_bytes=*/0, world_size);
  const int64_t bytes = options.workspace_bytes ? options.workspace_bytes : kDefaultWorkspaceBytes;
  if (bytes < kMinWorkspaceBytes) {
    fail(ErrorKind::kInvalidArgument, "workspace_bytes: expected at least ", kMinWorkspaceBytes, ", got ", bytes);
  }
  return WorkspaceLayout::for_group(bytes, world_size);
}

// Null where NCCL isn't asked for, or only if it is there and it isn't.
const NcclLibrary* nccl_for(const TransportOptions& options) {
  if (options.bootstrap == Bootstrap::kStore) return nullptr;
  try {
    return &load_nccl(options.nccl_path);
  } catch (const Error&) {
    if (options.bootstrap == Bootstrap::kNccl) throw;
    return nullptr;
  }
}

struct MailboxDeleter {
  void operator()(HostMailbox* mailbox) const { kernels::free_mailbox(mailbox); }
};

class CudaTransport final : public Transport {
 public:
  CudaTransport(Exchange& exchange, int device, const TransportOptions& options)
      : device_(device), strategy_(options.strategy) {
    agree_on_options(exchange, options);
    const std::string where = str("cuda:", device);
    const CudaDriver* driver = nullptr;
    const NcclLibrary* nccl = nullptr;
    // Every kernel is loaded now: a lazy load later could wait for a peer's spinning kernel.
    agree(exchange, "loading the CUDA driver and kernels", where, [&] {
      kernels::load_all(device);
      driver = &real_driver();
      nccl = nccl_for(options);
      group_.layout = layout_for(options, exchange.size());
      mailbox_.reset(kernels::allocate_mailbox());
    });

    SymmetricBufferOptions buffer_options;
    buffer_options.device = device;
    buffer_options.bytes = size_t(group_.layout.total_bytes);
    buffer_options.fill = kLamportSentinel;
    buffer_options.multicast = options.multicast ? MulticastMode::kAuto : MulticastMode::kOff;
    buffer_options.bootstrap = options.bootstrap;
    buffer_options.host_id = options.host_id;
    buffer_options.timeout_ms = int(options.timeout_ms);
    buffer_ = SymmetricBuffer::create(*driver, nccl, kernels::device_ops(), exchange, buffer_options);

    group_.rank = exchange.rank();
    group_.world_size = exchange.size();
    for (int r = 0; r < exchange.size(); ++r) group_.peers[r] = reinterpret_cast<std::byte*>(buffer_->address(r));
    group_.multicast = reinterpret_cast<std::byte*>(buffer_->multicast_address());
    group_.mailbox = mailbox_.get();
    set_timeout(options.timeout_ms);

    shape_.world_size = exchange.size();
    shape_.multiprocessors = buffer_->min_multiprocessors();
    shape_.layout = group_.layout;

    // The last stage: nobody may store a flag here before the flags are zero.
    agree(exchange, "initialising the control area", where, [&] {
      const int capability = buffer_->min_compute_capability();
      if (capability < kMinComputeCapability) {
        fail(ErrorKind::kUnsupported, "mnnvl needs GPUs of compute capability 9.0 or newer in the whole group, found ",
             capability / 10, ".", capability % 10);
      }
      const int64_t words = (group_.layout.total_bytes - group_.layout.signal_offset) / 4;
      kernels::device_ops().fill_words(device, buffer_->address(group_.rank) + uint64_t(group_.layout.signal_offset), 0,
                                       size_t(words));
      watchdog_.emplace(mailbox_.get(), buffer_->peer_pids(),
                        [this] { LOG(ERROR) << to_error(mailbox_->record, timeout_seconds()).what(); });
    });
  }

  ~CudaTransport() override { close(); }

  // The kernels in flight end by their deadline at the latest. Peers may still store into this rank's memory afterwards: their
  // mappings keep it alive.
  void close() override {
    std::lock_guard<std::mutex> lock(close_mutex_);
    if (!buffer_) return;
    kernels::synchronize_device(device_);
    watchdog_.reset();  // takes a last look at the mailbox
    buffer_.reset();
  }

  void all_reduce(const void* in, void* out, int64_t numel, Dtype dtype, ReduceOp op, Strategy strategy, bool pdl,
                  void* stream) override {
    check_usable();
    const AllReduceChoice choice =
        choose_all_reduce(shape_, numel, dtype, strategy == Strategy::kAuto ? strategy_ : strategy);
    kernels::Launch launch;
    launch.threads = choice.threads;
    launch.pdl = pdl;
    launch.stream = stream;
    kernels::AllReduceParams params;
    params.group = launch_group();
    params.dtype = dtype;
    params.blocks = choice.blocks;
    params.op = op;
    for (int64_t begin = 0; begin < numel; begin += choice.launch_elements) {
      params.in = static_cast<const std::byte*>(in) + begin * element_size(dtype);
      params.out = static_cast<std::byte*>(out) + begin * element_size(dtype);
      params.numel = min64(choice.launch_elements, numel - begin);
      switch (choice.algorithm) {
        case Algorithm::kOneShotLamport: kernels::launch_oneshot_lamport_allreduce(params, launch); break;
        case Algorithm::kTwoShotLamport: kernels::launch_twoshot_lamport_allreduce(params, launch); break;
      }
    }
  }

  void all_gather(const void* in, void* const* outs, int64_t bytes, void* stream) override {
    kernels::GatherParams params;
    params.in = in;
    std::copy(outs, outs + group_.world_size, params.outs);
    gather(params, bytes, stream);
  }

  void broadcast(void* data, int64_t bytes, int root, void* stream) override {
    kernels::GatherParams params;
    params.in = data;
    params.outs[root] = data;
    params.source = root;
    params.operation = Operation::kBroadcast;
    gather(params, bytes, stream);
  }

  void barrier(void* stream) override {
    kernels::GatherParams params;
    params.operation = Operation::kBarrier;
    gather(params, 0, stream);
  }

  void check() override {
    if (__atomic_load_n(&mailbox_->record.valid, __ATOMIC_ACQUIRE) != 0) {
      throw to_error(mailbox_->record, timeout_seconds());
    }
    if (__atomic_load_n(&mailbox_->abort, __ATOMIC_ACQUIRE) != 0) {
      fail(ErrorKind::kAborted, "mnnvl: abort() was called on this group on rank ", group_.rank);
    }
  }

  void abort() override {
    __atomic_store_n(&mailbox_->abort, 1u, __ATOMIC_RELEASE);
    tell_peers(group_.rank);
  }
  void set_timeout(int64_t timeout_ms) override { timeout_ns_ = uint64_t(timeout_ms) * 1'000'000; }

 private:
  double timeout_seconds() const { return double(timeout_ns_) * 1e-9; }

  DeviceGroup launch_group() const {
    DeviceGroup group = group_;
    group.timeout_ns = timeout_ns_;
    return group;
  }

  // Peers may wait in a kernel for this rank, which will launch nothing more.
  void tell_peers(int root) noexcept {
    std::lock_guard<std::mutex> lock(close_mutex_);
    if (!buffer_) return;
    const uint32_t word = abort_word(root);
    for (int r = 0; r < group_.world_size; ++r) {
      if (r == group_.rank) continue;  // the mailbox tells the own kernels
      const uint64_t address =
          buffer_->address(r) + uint64_t(group_.layout.control_offset) + offsetof(DeviceControl, abort);
      try {
        kernels::device_ops().store_words(device_, address, &word, 1, /*multicast=*/false);
      } catch (const Error& error) {
        LOG(WARNING) << "mnnvl: cannot tell rank " << r << " of the failure: " << error.what();
      }
    }
  }

  // Before a launch. A peer that has ended is a failure only for calls that still need it.
  void check_usable() {
    check();
    if (const int dead = watchdog_->dead_rank(); dead >= 0) {
      tell_peers(dead);
      fail(ErrorKind::kPeerFailed, "mnnvl: the process of rank ", dead, " has ended; rank ", group_.rank,
           " can make no further collective with it");
    }
  }

  void gather(kernels::GatherParams& params, int64_t bytes, void* stream) {
    check_usable();
    const GatherChoice choice = choose_gather(shape_, bytes);
    params.group = launch_group();
    params.bytes = bytes;
    params.blocks = choice.blocks;
    kernels::Launch launch;
    launch.threads = choice.threads;
    launch.stream = stream;
    kernels::launch_epoch_gather(params, launch);
  }

  // Members are destroyed in reverse: the watchdog before the mailbox it reads.
  int device_;
  Strategy strategy_;
  DeviceGroup group_{};
  std::atomic<uint64_t> timeout_ns_{0};
  std::mutex close_mutex_;  // buffer_ against close()
  GroupShape shape_;
  std::unique_ptr<HostMailbox, MailboxDeleter> mailbox_;
  std::unique_ptr<SymmetricBuffer> buffer_;
  std::optional<Watchdog> watchdog_;
};

}  // namespace

std::unique_ptr<Transport> make_cuda_transport(Exchange& exchange, int device, const TransportOptions& options) {
  return std::make_unique<CudaTransport>(exchange, device, options);
}

}  // namespace mnnvl
