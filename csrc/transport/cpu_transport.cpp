// Requests on the CPU: the steps of cpu/ over one memfd a rank.
#include <atomic>
#include <mutex>

#include "bootstrap/agreement.h"
#include "common/error.h"
#include "cpu/communicator.h"
#include "cpu/fused_rows.h"
#include "cpu/plan.h"
#include "memory/host_segment.h"
#include "transport/transport.h"
#include "tuning/choose_cpu.h"

namespace mnnvl {
namespace {

// A rank's part in the group as long as there is memory for it. Shared with whoever is in a call when it goes.
struct Attached {
  Attached(Exchange& exchange, const TransportOptions& options)
      : segments(HostSegments::create(exchange, segment_options(exchange, options))),
        communicator(communicator_options(exchange, *segments, options)) {}

  static HostSegmentsOptions segment_options(const Exchange& exchange, const TransportOptions& options) {
    HostSegmentsOptions result;
    result.bytes =
        options.workspace_bytes ? size_t(options.workspace_bytes) : cpu::default_segment_bytes(exchange.size());
    result.host_id = options.host_id;
    result.timeout_ms = options.timeout_ms;
    return result;
  }
  static cpu::CommunicatorOptions communicator_options(const Exchange& exchange, const HostSegments& segments,
                                                       const TransportOptions& options) {
    cpu::CommunicatorOptions result;
    result.rank = exchange.rank();
    result.world_size = exchange.size();
    for (int r = 0; r < exchange.size(); ++r) result.segments.push_back(segments.address(r));
    result.segment_bytes = segments.bytes();
    result.peer_pids = segments.peer_pids();
    if (options.counters) result.slept = &options.counters->slept;
    return result;
  }

  const std::unique_ptr<HostSegments> segments;
  cpu::Communicator communicator;
};

class CpuTransport final : public Transport {
 public:
  CpuTransport(Exchange& exchange, const TransportOptions& options)
      : options_(options),
        rank_(exchange.rank()),
        world_size_(exchange.size()),
        oneshot_bytes_(tuned(options.cpu_oneshot_bytes, exchange.size())) {
    agree_on_options(exchange, options, oneshot_bytes_);
    here_ = std::make_shared<Attached>(exchange, options_);
  }

  void run(const Request& request, const Run& run) override {
    const std::shared_ptr<Attached> here = existing();
    if (const auto* reduce = std::get_if<AllReduceRequest>(&request)) {
      AllReduceRequest chosen = *reduce;
      chosen.strategy = choose(chosen.strategy, chosen.numel * element_size(chosen.dtype));
      if (TransportCounters* c = options_.counters.get()) {
        count_one(chosen.strategy == Strategy::kOneShot ? c->cpu_oneshot : c->cpu_twoshot);
      }
      return here->communicator.run(chosen, run.timeout_ms);
    }
    if (const auto* fused = std::get_if<FusedRequest>(&request)) {
      FusedRequest chosen = *fused;
      const int64_t row_bytes = chosen.work.hidden * element_size(chosen.work.dtype);
      chosen.strategy = choose(chosen.strategy, min64(chosen.work.rows, cpu::rows_of_block(row_bytes)) * row_bytes);
      return here->communicator.run(chosen, run.timeout_ms);
    }
    here->communicator.run(request, run.timeout_ms);
  }
  void check() override {
    if (const auto here = now()) here->communicator.check();
    if (aborted_) fail(ErrorKind::kAborted, "mnnvl: abort() was called on this group on rank ", rank_);
  }
  // While detached, the peers hear of it when they want their memory back.
  void abort(FailureCause cause) override {
    aborted_ = true;
    if (const auto here = now()) here->communicator.abort(cause);
  }
  std::shared_ptr<Messenger> messenger() override {
    const std::shared_ptr<Attached> here = now();
    return here ? std::shared_ptr<Messenger>(here, &here->communicator.messenger()) : nullptr;
  }
  // Requests return when they are done; only messages can be under way.
  void close() override {
    if (const auto here = now()) here->communicator.messenger().wait_idle(std::chrono::milliseconds::max());
  }

  // The segments hold no address that anybody has kept: they go, and others come.
  size_t detach(Exchange& exchange) override {
    if (!attached()) return 0;
    agree(exchange, "waiting for messages", where(), [&] {
      close();
      check();
    });
    const size_t bytes = now()->segments->bytes();
    agree(exchange, "giving shared host memory back", where(), [&] {
      std::shared_ptr<Attached> last;
      std::lock_guard<std::mutex> lock(mutex_);
      last.swap(here_);
    });
    return bytes;
  }
  void attach(Exchange& exchange) override {
    if (attached()) return;
    agree(exchange, "looking for failures since the release", where(), [&] { check(); });
    auto made = std::make_shared<Attached>(exchange, options_);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      here_ = made;
    }
    if (aborted_) made->communicator.abort(FailureCause::kLocalAbort);  // since the last look at it
  }
  bool attached() const override { return now() != nullptr; }

 private:
  Strategy choose(Strategy asked, int64_t bytes) const {
    return choose_cpu_strategy(asked == Strategy::kAuto ? options_.strategy : asked, bytes, world_size_,
                               oneshot_bytes_);
  }

  std::shared_ptr<Attached> now() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return here_;
  }
  std::shared_ptr<Attached> existing() const {
    std::shared_ptr<Attached> here = now();
    if (!here) fail_detached();
    return here;
  }
  std::string where() const { return str("rank ", rank_, ", CPU"); }

  const TransportOptions options_;
  const int rank_;
  const int world_size_;
  const int64_t oneshot_bytes_;
  std::atomic<bool> aborted_{false};
  mutable std::mutex mutex_;
  std::shared_ptr<Attached> here_;  // under mutex_; null while detached
};

}  // namespace

std::unique_ptr<Transport> make_cpu_transport(Exchange& exchange, const TransportOptions& options) {
  return std::make_unique<CpuTransport>(exchange, options);
}

}  // namespace mnnvl
