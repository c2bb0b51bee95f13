// Stages 2 and 3 of a set-up: every rank exports an allocation and learns the others'.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "bootstrap/exchange.h"
#include "driver/cuda_driver.h"
#include "driver/nccl.h"
#include "memory/allocation.h"
#include "memory/options.h"
#include "system/unique_fd.h"

namespace mnnvl {

// What the stages of one set-up share on one rank.
struct SetupContext {
  const CudaDriver& driver;
  Exchange& exchange;
  std::string where;  // this rank's host and device
  int device = 0;
  HandleType handle = HandleType::kPosixFd;
  int64_t timeout_ms = 0;  // of waits inside a stage; shorter than the exchange's own, so that agreements outlast them
  std::string multicast_forbidden{};  // as in Plan; empty: multicast objects may be created

  int rank() const { return exchange.rank(); }
  int size() const { return exchange.size(); }
};

// A peer's allocation on its way: a fabric handle or a descriptor.
class SharedHandle {
 public:
  SharedHandle() = default;
  explicit SharedHandle(const CUmemFabricHandle& fabric) : fabric_(fabric), is_fabric_(true) {}
  explicit SharedHandle(UniqueFd fd) : fd_(std::move(fd)) {}
  Allocation import(const CudaDriver& driver) const;

 private:
  CUmemFabricHandle fabric_{};
  bool is_fabric_ = false;
  UniqueFd fd_;
};

// Collective. `make` gives the allocation that this rank shares, which must live until the peers have imported it, or
// null for none; it runs inside the first agreement. Records travel over `nccl`, or, where it is null, over the
// context's Exchange. Returns the peers' handles by rank, valid where one was shared, empty for this rank. Throws the
// same AgreedError on every rank; `what` names the allocation in it.
std::vector<SharedHandle> exchange_handles(const SetupContext& context, const NcclLibrary* nccl,
                                           const std::string& what, const std::function<const Allocation*()>& make);

}  // namespace mnnvl
