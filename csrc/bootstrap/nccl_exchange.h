// An Exchange over NCCL, for the one stage in which ranks swap memory handles. It owns the smallest communicator NCCL
// can make, a stream and a few hundred bytes of device memory per rank, and gives all of it back in its destructor.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "bootstrap/exchange.h"
#include "driver/cuda_driver.h"
#include "driver/nccl.h"

namespace mnnvl {

struct NcclExchangeOptions {
  std::string where;  // this rank's host and device, for errors
  size_t record_bytes = 128;  // no record is longer
  int64_t timeout_ms = 0;  // of each wait; a peer's failure ends it within a second
};

class NcclExchange final : public Exchange {
 public:
  // Collective over `inner`, which carries the unique id and the agreements. The caller has made the device's context
  // current. Throws the same Error on every rank. NCCL makes NVLink multicast objects of its own unless
  // NCCL_NVLS_ENABLE=0 in its environment: where none may be made, the plan of the set-up keeps from here.
  static std::unique_ptr<NcclExchange> create(const CudaDriver& driver, const NcclLibrary& nccl, Exchange& inner,
                                              const NcclExchangeOptions& options);
  ~NcclExchange() override;

  int rank() const override { return rank_; }
  int size() const override { return size_; }
  // Throws the same Error on every rank (it agrees over `inner`). After a failure the communicator is aborted at
  // destruction, so that no rank waits for another there.
  std::vector<std::string> all_gather(const std::string& mine) override;

 private:
  class Stream;
  class Memory;
  class Communicator;

  NcclExchange(const CudaDriver& driver, Exchange& inner, const NcclExchangeOptions& options);
  template <typename Ready>
  void wait_together(const std::string& stage, const Ready& ready);
  std::string unpack(const std::string& slots, int peer) const;

  const CudaDriver& driver_;
  Exchange& inner_;
  const std::string where_;
  const int rank_;
  const int size_;
  const size_t slot_bytes_;
  const int64_t timeout_ms_;
  std::unique_ptr<Stream> stream_;
  std::unique_ptr<Memory> memory_;  // slot [0] is sent, slots [1, size] are received
  std::unique_ptr<Communicator> communicator_;
};

}  // namespace mnnvl
