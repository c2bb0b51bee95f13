#include "memory/symmetric_buffer.h"

#include <algorithm>

#include "bootstrap/agreement.h"
#include "common/math.h"
#include "memory/capabilities.h"
#include "memory/handle_exchange.h"
#include "memory/multicast.h"
#include "memory/self_test.h"

namespace mnnvl {
namespace {

class SymmetricBufferImpl final : public SymmetricBuffer {
 public:
  size_t bytes() const override { return size_; }
  uint64_t address(int rank) const override { return addresses_[rank]; }
  uint64_t multicast_address() const override { return multicast_ != nullptr ? multicast_->address() : 0; }
  const std::string& multicast_problem() const override { return plan_.multicast_problem; }
  HandleType handle_type() const override { return plan_.handle; }
  int min_multiprocessors() const override { return plan_.min_multiprocessors; }
  int min_compute_capability() const override { return plan_.min_compute_capability; }
  const std::vector<int>& peer_pids() const override { return peer_pids_; }

  void set_up(const CudaDriver& driver, const NcclLibrary* nccl, const DeviceOps& ops, Exchange& exchange,
              const SymmetricBufferOptions& options) {
    const int64_t timeout_ms = options.timeout_ms > 0 ? options.timeout_ms : kDefaultSetUpTimeoutMs;
    SetupContext context{driver, exchange, /*where=*/"", options.device};
    context.timeout_ms = std::max<int64_t>(1, timeout_ms / 2);
    std::vector<Capabilities> ranks = compare(context, nccl != nullptr, options);
    std::vector<SharedHandle> handles = allocate(context, nccl, options);
    map(context, ranks, handles);
    add_multicast(context);
    test(context, ranks, ops, options.fill);
  }

 private:
  // Stage 1. Capabilities, and the plan that follows from them.
  std::vector<Capabilities> compare(SetupContext& context, bool has_nccl, const SymmetricBufferOptions& options) {
    std::string where = str("host ", host_identity("").hostname, ", device ", options.device);
    std::vector<std::string> records = agree_gather(context.exchange, "finding out what the device can do", where, [&] {
      Capabilities found = find_capabilities(context.driver, options);
      found.has_nccl = has_nccl;
      return found.serialise();
    });
    std::vector<Capabilities> ranks;
    std::vector<HostIdentity> hosts;
    for (const std::string& record : records) {
      ranks.push_back(Capabilities::parse(record));
      hosts.push_back(ranks.back().host);
    }
    plan_ = choose_plan(ranks);
    peer_pids_ = visible_pids(hosts, context.rank());
    context.where = ranks[context.rank()].where();
    context.handle = plan_.handle;
    context.multicast_forbidden = plan_.multicast_forbidden;
    return ranks;
  }

  // Stages 2 and 3. Allocate, export, exchange.
  std::vector<SharedHandle> allocate(const SetupContext& context, const NcclLibrary* nccl,
                                     const SymmetricBufferOptions& options) {
    size_ = align_up(options.bytes, plan_.granularity);
    alignment_ = plan_.granularity;
    if (plan_.multicast) {
      without_multicast_if_it_fails([&] {
        alignment_ = std::max(alignment_, multicast_granularity(context, size_));
        size_ = align_up(options.bytes, alignment_);
      });
    }
    const NcclLibrary* route = nullptr;
    if (plan_.bootstrap == Bootstrap::kNccl && context.size() > 1) {
      agree(context.exchange, "finding NCCL", context.where, [&] {
        if (nccl == nullptr) {
          fail(ErrorKind::kUnsupported,
               "bootstrap=\"nccl\" needs a NCCL library, and none is loaded; set bootstrap=\"store\"");
        }
      });
      route = nccl;
    }
    return exchange_handles(context, route, "the buffer", [&] {
      memory_ = Allocation::create(context.driver, context.device, plan_.handle, size_);
      return &memory_;
    });
  }

  // Stage 4. Import and map every peer.
  void map(const SetupContext& context, const std::vector<Capabilities>& ranks, std::vector<SharedHandle>& handles) {
    agree(context.exchange, "mapping the ranks' memory", context.where, [&] {
      for (int peer = 0; peer < context.size(); ++peer) {
        try {
          map_one(context, peer, handles[peer]);
        } catch (const Error& error) {
          fail(error.kind(), "memory of rank ", peer, " (", ranks[peer].where(), "): ", error.what());
        }
      }
    });
    handles.clear();
  }

  void map_one(const SetupContext& context, int peer, const SharedHandle& handle) {
    // An imported allocation is only needed to be mapped.
    const bool own = peer == context.rank();
    Allocation imported = own ? Allocation() : handle.import(context.driver);
    mappings_.push_back(
        std::make_unique<Mapping>(context.driver, context.device, own ? memory_ : imported, size_, alignment_));
    addresses_.push_back(mappings_.back()->address());
  }

  // Stage 5. Multicast, where everybody can and may; else unicast for all.
  void add_multicast(const SetupContext& context) {
    if (!plan_.multicast) return;
    without_multicast_if_it_fails([&] { multicast_ = Multicast::create(context, memory_, size_, alignment_); });
  }

  // Stages 6 and 7. Initialise, self-test, and back to the value at rest.
  void test(const SetupContext& context, const std::vector<Capabilities>& ranks, const DeviceOps& ops, uint32_t fill) {
    std::vector<std::string> wheres;
    for (const Capabilities& c : ranks) wheres.push_back(c.where());
    SelfTest self_test{context, ops, addresses_, wheres, size_, fill};
    self_test.fill_own("initialising the buffer");
    self_test.check_peers();
    if (multicast_ != nullptr) {
      self_test.fill_own("initialising the buffer again");
      without_multicast_if_it_fails([&] { self_test.check_multicast(multicast_->address()); });
    }
    self_test.fill_own("leaving the buffer at rest");
  }

  // Every rank catches the same AgreedError, so all drop multicast together.
  template <typename Stage>
  void without_multicast_if_it_fails(const Stage& stage) {
    try {
      stage();
    } catch (const AgreedError& error) {
      multicast_.reset();
      plan_.multicast = false;
      plan_.multicast_problem = error.what();
    }
  }

  static size_t align_up(size_t size, size_t alignment) {
    return static_cast<size_t>(mnnvl::align_up(static_cast<int64_t>(size), static_cast<int64_t>(alignment)));
  }

  Plan plan_;
  size_t size_ = 0;
  size_t alignment_ = 1;
  std::vector<int> peer_pids_;
  std::vector<uint64_t> addresses_;
  // Released from the last to the first: multicast before the mappings, these before the memory.
  Allocation memory_;
  std::vector<std::unique_ptr<Mapping>> mappings_;
  std::unique_ptr<Multicast> multicast_;
};

}  // namespace

std::unique_ptr<SymmetricBuffer> SymmetricBuffer::create(const CudaDriver& driver, const NcclLibrary* nccl,
                                                         const DeviceOps& ops, Exchange& exchange,
                                                         const SymmetricBufferOptions& options) {
  auto buffer = std::make_unique<SymmetricBufferImpl>();
  buffer->set_up(driver, nccl, ops, exchange, options);
  return buffer;
}

}  // namespace mnnvl
