#include "memory/handle_exchange.h"

#include <cstring>
#include <memory>

#include "bootstrap/agreement.h"
#include "bootstrap/fd_channel.h"
#include "bootstrap/nccl_exchange.h"

namespace mnnvl {
namespace {

// The communicator lives for this one all-gather.
std::vector<std::string> gather_over_nccl(const SetupContext& context, const NcclLibrary& nccl,
                                          const std::string& mine) {
  NcclExchangeOptions options;
  options.where = context.where;
  options.record_bytes = sizeof(CUmemFabricHandle);
  options.timeout_ms = context.timeout_ms;
  return NcclExchange::create(context.driver, nccl, context.exchange, options)->all_gather(mine);
}

SharedHandle fabric_handle(const std::string& record, int peer) {
  if (record.empty()) return SharedHandle();
  CUmemFabricHandle fabric;
  if (record.size() != sizeof(fabric))
    fail(ErrorKind::kSystem, "rank ", peer, " sent a fabric handle of ", record.size(), " bytes");
  std::memcpy(&fabric, record.data(), sizeof(fabric));
  return SharedHandle(fabric);
}

}  // namespace

Allocation SharedHandle::import(const CudaDriver& driver) const {
  MNNVL_ASSERT(is_fabric_ || fd_, "import of a handle that was not shared");
  return is_fabric_ ? Allocation::import_fabric(driver, fabric_) : Allocation::import_fd(driver, fd_.get());
}

std::vector<SharedHandle> exchange_handles(const SetupContext& context, const NcclLibrary* nccl,
                                           const std::string& what, const std::function<const Allocation*()>& make) {
  const bool fabric = context.handle == HandleType::kFabric;
  const bool alone = context.size() == 1;
  UniqueFd fd;
  std::unique_ptr<FdChannel> channel;

  // For a fabric the record is the handle itself; else it is where to fetch the descriptor.
  auto prepare = [&]() -> std::string {
    const Allocation* mine = make();
    if (fabric) {
      if (mine == nullptr) return "";
      CUmemFabricHandle handle = mine->export_fabric();
      return std::string(reinterpret_cast<const char*>(handle.data), sizeof(handle.data));
    }
    if (mine != nullptr) fd = mine->export_fd();
    if (alone) return "";
    channel = std::make_unique<FdChannel>();
    return channel->address();
  };

  const std::string stage = "allocating and exporting " + what;
  std::vector<std::string> records;
  if (nccl != nullptr && !alone) {
    std::string mine;
    agree(context.exchange, stage, context.where, [&] { mine = prepare(); });
    records = gather_over_nccl(context, *nccl, mine);
  } else {
    records = agree_gather(context.exchange, stage, context.where, prepare);
  }

  std::vector<SharedHandle> handles(context.size());
  if (alone) return handles;
  agree(context.exchange, fabric ? "reading fabric handles" : "passing descriptors between processes", context.where,
        [&] {
          std::vector<UniqueFd> fds;
          if (!fabric) fds = channel->exchange(context.rank(), records, fd.get(), context.timeout_ms);
          for (int peer = 0; peer < context.size(); ++peer) {
            if (peer == context.rank()) continue;
            handles[peer] = fabric ? fabric_handle(records[peer], peer) : SharedHandle(std::move(fds[peer]));
          }
        });
  return handles;
}

}  // namespace mnnvl
