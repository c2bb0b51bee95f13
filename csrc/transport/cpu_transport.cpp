#include <atomic>

#include "transport/transport.h"
#include "common/error.h"
#include "cpu/communicator.h"
#include "memory/host_segment.h"

namespace mnnvl {
namespace {

class CpuTransport final : public Transport {
 public:
  CpuTransport(Exchange& exchange, const TransportOptions& options)
      : timeout_ms_(options.timeout_ms), strategy_(options.strategy) {
    agree_on_options(exchange, options);
    HostSegmentsOptions segment_options;
    segment_options.bytes =
        options.workspace_bytes ? size_t(options.workspace_bytes) : cpu::default_segment_bytes(exchange.size());
    segment_options.host_id = options.host_id;
    segment_options.timeout_ms = int(options.timeout_ms);
    segments_ = HostSegments::create(exchange, segment_options);

    cpu::CommunicatorOptions communicator_options;
    communicator_options.rank = exchange.rank();
    communicator_options.world_size = exchange.size();
    for (int r = 0; r < exchange.size(); ++r) communicator_options.segments.push_back(segments_->address(r));
    communicator_options.segment_bytes = segments_->bytes();
    communicator_options.peer_pids = segments_->peer_pids();
    communicator_ = cpu::Communicator::create(communicator_options);
  }

  void all_reduce(const void* in, void* out, int64_t numel, Dtype dtype, ReduceOp op, Strategy strategy, bool /*pdl*/,
                  void*) override {
    communicator_->all_reduce(in, out, numel, dtype, op, strategy == Strategy::kAuto ? strategy_ : strategy,
                              timeout_ms_);
  }
  void all_gather(const void* in, void* const* outs, int64_t bytes, void*) override {
    communicator_->all_gather(in, outs, bytes, timeout_ms_);
  }
  void broadcast(void* data, int64_t bytes, int root, void*) override {
    communicator_->broadcast(data, bytes, root, timeout_ms_);
  }
  void barrier(void*) override { communicator_->barrier(timeout_ms_); }
  void check() override { communicator_->check(); }
  void abort() override { communicator_->abort(); }
  void close() override {}  // calls return when they are done, and the destructor waits for nobody
  void set_timeout(int64_t timeout_ms) override { timeout_ms_ = timeout_ms; }

 private:
  std::atomic<int64_t> timeout_ms_;
  Strategy strategy_;
  std::unique_ptr<HostSegments> segments_;
  std::unique_ptr<cpu::Communicator> communicator_;
};

}  // namespace

std::unique_ptr<Transport> make_cpu_transport(Exchange& exchange, const TransportOptions& options) {
  return std::make_unique<CpuTransport>(exchange, options);
}

}  // namespace mnnvl
