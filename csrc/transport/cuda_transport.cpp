// Requests on a GPU: kernels over the peer-mapped workspace.
#include <algorithm>
#include <atomic>
#include <mutex>
#include <optional>

#include "bootstrap/agreement.h"
#include "common/error.h"
#include "common/first_failure.h"
#include "driver/cuda_driver.h"
#include "driver/nccl.h"
#include "kernels/kernels.h"
#include "memory/capabilities.h"
#include "memory/symmetric_buffer.h"
#include "protocol/failure_text.h"
#include "system/deadline.h"
#include "transport/cuda_launch.h"
#include "transport/transport.h"
#include "transport/watchdog.h"

namespace mnnvl {
namespace {

constexpr int64_t kDefaultWorkspaceBytes = int64_t{64} << 20;
constexpr int64_t kMinWorkspaceBytes = int64_t{1} << 20;

WorkspaceLayout layout_for(const TransportOptions& options, int world_size) {
  if (options.stage_bytes > 0) return WorkspaceLayout::make(options.stage_bytes, /*channel_bytes=*/0, world_size);
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
  void operator()(HostMailbox* mailbox) const { kernels::table().host.free_mailbox(mailbox); }
};

class CudaTransport final : public Transport {
 public:
  CudaTransport(Exchange& exchange, int device, const TransportOptions& options)
      : device_(device), log_(options.log), counters_(options.counters) {
    context_.strategy = options.strategy;
    context_.pdl = options.pdl;
    async_max_ctas_ = options.async_max_ctas;
    context_.counters = counters_.get();
    timeout_ms_ = options.timeout_ms;
    context_.shape.oneshot_bytes = tuned(options.cuda_oneshot_bytes, exchange.size());
    agree_on_options(exchange, options, context_.shape.oneshot_bytes);
    const NcclLibrary* nccl = nullptr;
    // Every kernel is loaded now: a lazy load later could wait for a peer's spinning kernel.
    agree(exchange, "loading the CUDA driver and kernels", where_, [&] {
      check_supported(real_driver(), device);
      kernels::table().host.load_all(device);
      nccl = nccl_for(options);
      context_.group.layout = layout_for(options, exchange.size());
      mailbox_.reset(kernels::table().host.allocate_mailbox());
    });
    map(exchange, nccl, options);
    open(exchange);
  }

  ~CudaTransport() override { close(); }

  // The kernels in flight end by their deadline at the latest. Peers may still store into this rank's memory
  // afterwards: their mappings keep it alive.
  void close() override {
    std::lock_guard<std::mutex> lock(close_mutex_);
    if (!buffer_) return;
    const bool idle = kernels::table().host.synchronize_device(device_);
    watchdog_.reset();  // takes a last look at the mailbox
    if (idle) {
      buffer_.reset();
      return;
    }
    // Kernels may still be running on what would be unmapped: a capture elsewhere forbids the wait, or the context
    // is lost.
    log("mnnvl: the device could not be waited for; the workspace stays mapped until the process ends");
    (void)buffer_.release();
    (void)mailbox_.release();
  }

  // The watchdog stays, and so does what it looks at: processes, and the mailbox.
  size_t detach(Exchange& exchange) override {
    if (!attached_) return 0;
    // When all have come out of it, no kernel of any rank is left that could touch the memory of any other.
    agree(exchange, "waiting for the device", where_, [&] {
      check();
      if (!kernels::table().host.synchronize_device(device_)) {
        fail(ErrorKind::kSystem, "the device could not be waited for: a capture is under way, or its context is lost");
      }
      check();
    });
    {
      std::lock_guard<std::mutex> lock(close_mutex_);
      attached_ = false;  // from here on abort() stores nothing through the mappings
    }
    buffer_->detach(exchange);
    return buffer_->bytes();
  }

  void attach(Exchange& exchange) override {
    if (attached_) return;
    agree(exchange, "looking for failures since the release", where_, [&] { check(); });
    buffer_->attach(exchange);
    try {
      open(exchange);
    } catch (...) {
      buffer_->drop();
      throw;
    }
  }

  bool attached() const override { return attached_; }

  void run(const Request& request, const Run& run) override {
    check_usable();
    launch(context_of(run), request);
  }

  // A peer that has ended may have sent before.
  void exchange(const ExchangeRequest& request, const Run& run) override {
    check();
    check_attached(*this);
    launch(context_of(run), request);
  }

  void check() override {
    if (failed()) throw recorded_failure();
    if (__atomic_load_n(&mailbox()->abort, __ATOMIC_ACQUIRE) != 0) {
      fail(ErrorKind::kAborted, "mnnvl: abort() was called on this group on rank ", context_.group.rank);
    }
  }

  void abort(FailureCause cause) override {
    __atomic_store_n(&mailbox()->abort, uint32_t(cause), __ATOMIC_RELEASE);
    // A kernel that gave up has told them what it found.
    if (!failed()) tell_peers(context_.group.rank, cause);
  }

 private:
  HostMailbox* mailbox() const { return context_.group.mailbox; }
  bool failed() const { return __atomic_load_n(&mailbox()->record.valid, __ATOMIC_ACQUIRE) != 0; }

  LaunchContext context_of(const Run& run) {
    LaunchContext context = context_;
    context.group.timeout_ns = uint64_t(clamp_timeout_ms(run.timeout_ms)) * 1'000'000;
    context.stream = run.stream;
    if (run.beside_compute) context.lamport_blocks = async_max_ctas_;
    timeout_ms_ = run.timeout_ms;
    return context;
  }

  Error recorded_failure() const {
    const FailureRecord& record = mailbox()->record;
    FailureDetails details;
    Mismatch mismatch{Mismatch::Kind::kCalls, unpack(record.calls.mine), unpack(record.calls.theirs)};
    if (mismatch.mine.operation == Operation::kSend) mismatch.kind = Mismatch::Kind::kMessage;
    mismatch.mine.tag = record.calls.my_tag;
    mismatch.theirs.tag = record.calls.their_tag;
    if (record.cause == FailureCause::kMismatch) details.mismatch = &mismatch;
    return to_error(record, double(timeout_ms_) * 1e-3, details);
  }

  void log(const std::string& text) const {
    if (log_) log_(text);
  }

  void map(Exchange& exchange, const NcclLibrary* nccl, const TransportOptions& options) {
    SymmetricBufferOptions buffer_options;
    buffer_options.device = device_;
    buffer_options.bytes = size_t(context_.group.layout.total_bytes);
    buffer_options.fill = kLamportSentinel;
    buffer_options.multicast = options.multicast ? MulticastMode::kAuto : MulticastMode::kOff;
    buffer_options.multicast_forbidden = options.multicast_forbidden;
    buffer_options.bootstrap = options.bootstrap;
    buffer_options.host_id = options.host_id;
    buffer_options.timeout_ms = options.timeout_ms;
    buffer_ = SymmetricBuffer::create(real_driver(), nccl, kernels::table().device_ops, exchange, buffer_options);

    DeviceGroup& group = context_.group;
    group.rank = exchange.rank();
    group.world_size = exchange.size();
    for (int r = 0; r < exchange.size(); ++r) group.peers[r] = reinterpret_cast<std::byte*>(buffer_->address(r));
    group.multicast = reinterpret_cast<std::byte*>(buffer_->multicast_address());
    group.mailbox = mailbox_.get();
    context_.shape.world_size = exchange.size();
    context_.shape.multiprocessors = buffer_->min_multiprocessors();
    context_.shape.max_blocks = options.max_ctas;
    context_.shape.layout = group.layout;
    context_.shape.multicast = group.multicast != nullptr;
  }

  // The last stage of a set-up: nobody may store a flag before everybody's flags are zero.
  void open(Exchange& exchange) {
    agree(exchange, "initialising the control area", where_, [&] { initialise(); });
    std::lock_guard<std::mutex> lock(close_mutex_);
    attached_ = true;
    // An abort() since the last look at it had no memory to tell the peers through.
    const uint32_t cause = __atomic_load_n(&mailbox()->abort, __ATOMIC_ACQUIRE);
    if (cause != 0) store_abort_words(context_.group.rank, FailureCause(cause));
  }

  void initialise() {
    const WorkspaceLayout& layout = context_.group.layout;
    const uint64_t words = buffer_->address(context_.group.rank) + uint64_t(layout.lines_offset);
    kernels::table().device_ops.fill_words(device_, words, 0, size_t((layout.total_bytes - layout.lines_offset) / 4));
    if (!watchdog_) watchdog_.emplace(mailbox(), buffer_->peer_pids(), [this] { log(recorded_failure().what()); });
  }

  // Peers may wait in a kernel for this rank, which will launch nothing more. While detached none can.
  void tell_peers(int root, FailureCause cause) noexcept {
    std::lock_guard<std::mutex> lock(close_mutex_);
    if (buffer_ && attached_) store_abort_words(root, cause);
  }

  // With close_mutex_ held.
  void store_abort_words(int root, FailureCause cause) noexcept {
    const uint32_t word = abort_word(root, cause, context_.group.rank);
    for (int r = 0; r < context_.group.world_size; ++r) {
      if (r == context_.group.rank) continue;  // the mailbox tells the own kernels
      const uint64_t address =
          buffer_->address(r) + uint64_t(context_.group.layout.control_offset) + offsetof(DeviceControl, abort);
      try {
        kernels::table().device_ops.store_words(device_, address, &word, 1, /*multicast=*/false);
      } catch (const Error& error) {
        log(str("mnnvl: cannot tell rank ", r, " of the failure: ", error.what()));
      }
    }
  }

  // Before a launch. A peer that has ended is a failure only for calls that still need it.
  void check_usable() {
    check();
    check_attached(*this);
    if (const int dead = watchdog_->dead_rank(); dead >= 0) {
      tell_peers(dead, FailureCause::kPeerDied);
      fail(ErrorKind::kPeerFailed, "mnnvl: the process of rank ", dead, " has ended; rank ", context_.group.rank,
           " can make no further collective with it");
    }
  }

  // Members are destroyed in reverse: the watchdog before the mailbox it reads.
  const int device_;
  const std::string where_ = str("cuda:", device_);
  const std::function<void(const std::string&)> log_;
  const std::shared_ptr<TransportCounters> counters_;
  LaunchContext context_{};
  int async_max_ctas_ = 0;
  std::atomic<int64_t> timeout_ms_{0};  // of the last request, for the words of a failure
  std::mutex close_mutex_;  // buffer_ against close(), its mappings against detach()
  std::atomic<bool> attached_{false};  // changes under close_mutex_
  std::unique_ptr<HostMailbox, MailboxDeleter> mailbox_;
  std::unique_ptr<SymmetricBuffer> buffer_;
  std::optional<Watchdog> watchdog_;
};

}  // namespace

std::unique_ptr<Transport> make_cuda_transport(Exchange& exchange, int device, const TransportOptions& options) {
  return std::make_unique<CudaTransport>(exchange, device, options);
}

}  // namespace mnnvl
