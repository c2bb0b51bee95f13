// Requests on the CPU: the steps of cpu/ over one memfd a rank.
#include "common/error.h"
#include "cpu/communicator.h"
#include "cpu/fused_rows.h"
#include "cpu/plan.h"
#include "memory/host_segment.h"
#include "transport/transport.h"
#include "tuning/choose_cpu.h"

namespace mnnvl {
namespace {

class CpuTransport final : public Transport {
 public:
  CpuTransport(Exchange& exchange, const TransportOptions& options)
      : world_size_(exchange.size()), strategy_(options.strategy) {
    agree_on_options(exchange, options);
    HostSegmentsOptions segment_options;
    segment_options.bytes =
        options.workspace_bytes ? size_t(options.workspace_bytes) : cpu::default_segment_bytes(exchange.size());
    segment_options.host_id = options.host_id;
    segment_options.timeout_ms = options.timeout_ms;
    segments_ = HostSegments::create(exchange, segment_options);

    cpu::CommunicatorOptions communicator_options;
    communicator_options.rank = exchange.rank();
    communicator_options.world_size = exchange.size();
    for (int r = 0; r < exchange.size(); ++r) communicator_options.segments.push_back(segments_->address(r));
    communicator_options.segment_bytes = segments_->bytes();
    communicator_options.peer_pids = segments_->peer_pids();
    communicator_ = std::make_unique<cpu::Communicator>(communicator_options);
  }

  void run(const Request& request, const Run& run) override {
    if (const auto* reduce = std::get_if<AllReduceRequest>(&request)) {
      AllReduceRequest chosen = *reduce;
      chosen.strategy = choose(chosen.strategy, chosen.numel * element_size(chosen.dtype));
      return communicator_->run(chosen, run.timeout_ms);
    }
    if (const auto* fused = std::get_if<FusedRequest>(&request)) {
      FusedRequest chosen = *fused;
      const int64_t row_bytes = chosen.work.hidden * element_size(chosen.work.dtype);
      chosen.strategy = choose(chosen.strategy, min64(chosen.work.rows, cpu::rows_of_block(row_bytes)) * row_bytes);
      return communicator_->run(chosen, run.timeout_ms);
    }
    communicator_->run(request, run.timeout_ms);
  }
  void check() override { communicator_->check(); }
  void abort(FailureCause cause) override { communicator_->abort(cause); }
  Messenger* messenger() override { return &communicator_->messenger(); }
  // Requests return when they are done; only messages can be under way.
  void close() override { communicator_->messenger().wait_idle(std::chrono::milliseconds::max()); }

 private:
  Strategy choose(Strategy asked, int64_t bytes) const {
    return choose_cpu_strategy(asked == Strategy::kAuto ? strategy_ : asked, bytes, world_size_);
  }

  const int world_size_;
  const Strategy strategy_;
  std::unique_ptr<HostSegments> segments_;
  std::unique_ptr<cpu::Communicator> communicator_;
};

}  // namespace

std::unique_ptr<Transport> make_cpu_transport(Exchange& exchange, const TransportOptions& options) {
  return std::make_unique<CpuTransport>(exchange, options);
}

}  // namespace mnnvl
