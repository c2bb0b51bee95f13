#include "memory/symmetric_buffer.h"

#include <algorithm>

#include "bootstrap/agreement.h"
#include "common/first_failure.h"
#include "common/math.h"
#include "memory/capabilities.h"
#include "memory/handle_exchange.h"
#include "memory/multicast.h"
#include "memory/self_test.h"

namespace mnnvl {
namespace {

class SymmetricBufferImpl final : public SymmetricBuffer {
 public:
  SymmetricBufferImpl(const CudaDriver& driver, const NcclLibrary* nccl, const DeviceOps& ops,
                      const SymmetricBufferOptions& options)
      : driver_(driver), nccl_(nccl), ops_(ops), options_(options) {}

  size_t bytes() const override { return size_; }
  uint64_t address(int rank) const override { return ranges_[rank]->address(); }
  uint64_t multicast_address() const override { return multicast_ != nullptr ? multicast_->address() : 0; }
  const std::string& multicast_problem() const override { return plan_.multicast_problem; }
  HandleType handle_type() const override { return plan_.handle; }
  int min_multiprocessors() const override { return plan_.min_multiprocessors; }
  const std::vector<int>& peer_pids() const override { return peer_pids_; }

  void set_up(Exchange& exchange) {
    compare(exchange);
    const SetupContext context = context_of(exchange);
    choose_size(context);
    build(context);
    handed_out_ = true;
  }

  void detach(Exchange& exchange) override {
    agree(exchange, "giving the buffer's memory back", wheres_[exchange.rank()], [&] { take_down(); });
  }

  void attach(Exchange& exchange) override {
    try {
      build(context_of(exchange));
    } catch (...) {
      drop();
      throw;
    }
  }

  void drop() noexcept override {
    FirstFailure ignored;  // the one that led here tells more
    ignored.guard([&] { take_down(); });
  }

 private:
  SetupContext context_of(Exchange& exchange) const {
    const int64_t timeout_ms = options_.timeout_ms > 0 ? options_.timeout_ms : kDefaultSetUpTimeoutMs;
    SetupContext context{driver_, exchange, wheres_[exchange.rank()], options_.device};
    context.timeout_ms = std::max<int64_t>(1, timeout_ms / 2);
    context.handle = plan_.handle;
    context.multicast_forbidden = plan_.multicast_forbidden;
    return context;
  }

  // Stage 1. Capabilities, and the plan that follows from them.
  void compare(Exchange& exchange) {
    std::string where = str("host ", host_identity("").hostname, ", device ", options_.device);
    std::vector<std::string> records = agree_gather(exchange, "finding out what the device can do", where, [&] {
      Capabilities found = find_capabilities(driver_, options_);
      found.has_nccl = nccl_ != nullptr;
      return found.serialise();
    });
    std::vector<Capabilities> ranks;
    std::vector<HostIdentity> hosts;
    for (const std::string& record : records) {
      ranks.push_back(Capabilities::parse(record, static_cast<int>(ranks.size())));
      hosts.push_back(ranks.back().host);
      wheres_.push_back(ranks.back().where());
    }
    plan_ = choose_plan(ranks);
    peer_pids_ = visible_pids(hosts, exchange.rank());
  }

  void choose_size(const SetupContext& context) {
    alignment_ = plan_.granularity;
    size_ = align_up(options_.bytes, alignment_);
    if (!plan_.multicast) return;
    without_multicast_if_it_fails([&] {
      alignment_ = std::max(alignment_, multicast_granularity(context, size_));
      size_ = align_up(options_.bytes, alignment_);
    });
  }

  // What makes a buffer of addresses, or of nothing yet.
  void build(const SetupContext& context) {
    std::vector<SharedHandle> handles = allocate(context);
    map(context, handles);
    add_multicast(context);
    test(context);
  }

  // Stages 2 and 3. Allocate, export, exchange.
  std::vector<SharedHandle> allocate(const SetupContext& context) {
    const NcclLibrary* route = nullptr;
    if (plan_.bootstrap == Bootstrap::kNccl && context.size() > 1) {
      agree(context.exchange, "finding NCCL", context.where, [&] {
        if (nccl_ == nullptr) {
          fail(ErrorKind::kUnsupported,
               "bootstrap=\"nccl\" needs a NCCL library, and none is loaded; set bootstrap=\"store\"");
        }
      });
      route = nccl_;
    }
    return exchange_handles(context, route, "the buffer", [&] {
      memory_ = Allocation::create(context.driver, context.device, plan_.handle, size_);
      return &memory_;
    });
  }

  // Stage 4. Import and map every peer.
  void map(const SetupContext& context, std::vector<SharedHandle>& handles) {
    agree(context.exchange, "mapping the ranks' memory", context.where, [&] {
      for (int peer = 0; peer < context.size(); ++peer) {
        try {
          map_one(context, peer, handles[peer]);
        } catch (const Error& error) {
          fail(error.kind(), "memory of rank ", peer, " (", wheres_[peer], "): ", error.what(), plan_.mapping_hint);
        }
      }
    });
    handles.clear();
  }

  void map_one(const SetupContext& context, int peer, const SharedHandle& handle) {
    // An imported allocation is only needed to be mapped.
    const bool own = peer == context.rank();
    Allocation imported = own ? Allocation() : handle.import(context.driver);
    if (peer == static_cast<int>(ranges_.size())) {  // the first time; it stays
      ranges_.push_back(std::make_unique<AddressRange>(context.driver, size_, alignment_));
    }
    mappings_.push_back(std::make_unique<Mapping>(*ranges_[peer], context.device, own ? memory_ : imported));
  }

  // Stage 5. Multicast, where everybody can and may; else unicast for all.
  void add_multicast(const SetupContext& context) {
    if (!plan_.multicast) return;
    without_multicast_if_it_fails([&] {
      if (multicast_ == nullptr) multicast_ = std::make_unique<Multicast>();
      multicast_->attach(context, memory_, size_, alignment_);
    });
  }

  // Stages 6 and 7. Initialise, self-test, and back to the value at rest.
  void test(const SetupContext& context) {
    std::vector<CUdeviceptr> addresses;
    for (const auto& range : ranges_) addresses.push_back(range->address());
    SelfTest self_test{context, ops_, addresses, wheres_, size_, options_.fill};
    self_test.fill_own("initialising the buffer");
    self_test.check_peers();
    if (multicast_ != nullptr) {
      self_test.fill_own("initialising the buffer again");
      without_multicast_if_it_fails([&] { self_test.check_multicast(multicast_->address()); });
    }
    self_test.fill_own("leaving the buffer at rest");
  }

  // Every rank catches the same AgreedError, so all drop multicast together. Not when its address is known outside.
  template <typename Stage>
  void without_multicast_if_it_fails(const Stage& stage) {
    try {
      stage();
    } catch (const AgreedError& error) {
      if (handed_out_) throw;
      multicast_.reset();
      plan_.multicast = false;
      plan_.multicast_problem = error.what();
    }
  }

  // All that build() made but the addresses, as far as it came: multicast before the mappings, these before the memory.
  void take_down() {
    FirstFailure failure;
    if (multicast_ != nullptr) failure.guard([&] { multicast_->detach(); });
    for (const auto& mapping : mappings_) failure.guard([&] { mapping->release(); });
    mappings_.clear();
    failure.guard([&] { memory_.release(); });
    failure.check();
  }

  static size_t align_up(size_t size, size_t alignment) {
    return static_cast<size_t>(mnnvl::align_up(static_cast<int64_t>(size), static_cast<int64_t>(alignment)));
  }

  const CudaDriver& driver_;
  const NcclLibrary* const nccl_;
  const DeviceOps& ops_;
  const SymmetricBufferOptions options_;
  Plan plan_;
  size_t size_ = 0;
  size_t alignment_ = 1;
  std::vector<int> peer_pids_;
  std::vector<std::string> wheres_;  // by rank
  bool handed_out_ = false;  // the addresses, multicast's too
  // Released from the last to the first, as in take_down().
  std::vector<std::unique_ptr<AddressRange>> ranges_;  // by rank
  Allocation memory_;
  std::vector<std::unique_ptr<Mapping>> mappings_;  // by rank; empty while detached
  std::unique_ptr<Multicast> multicast_;
};

}  // namespace

std::unique_ptr<SymmetricBuffer> SymmetricBuffer::create(const CudaDriver& driver, const NcclLibrary* nccl,
                                                         const DeviceOps& ops, Exchange& exchange,
                                                         const SymmetricBufferOptions& options) {
  auto buffer = std::make_unique<SymmetricBufferImpl>(driver, nccl, ops, options);
  buffer->set_up(exchange);
  return buffer;
}

}  // namespace mnnvl
