#include "bootstrap/nccl_exchange.h"

#include <cstdlib>
#include <cstring>
#include <thread>

#include "bootstrap/agreement.h"
#include "bootstrap/deadline.h"
#include "common/math.h"

namespace mnnvl {
namespace {

constexpr int64_t kSlotAlignment = 16;
void nap() { std::this_thread::sleep_for(std::chrono::microseconds(200)); }

}  // namespace

class NcclExchange::Stream {
 public:
  explicit Stream(const CudaDriver& driver) : driver_(driver) {
    // Flags 0: ordered with the legacy stream on which cuMemcpyHtoD finishes its copy.
    check(driver, driver.stream_create(&stream_, 0), "cuStreamCreate");
  }
  ~Stream() { driver_.stream_destroy(stream_); }
  CUstream get() const { return stream_; }

  void wait(const char* what, int timeout_ms) const {
    Deadline deadline(timeout_ms);
    CUresult code;
    while ((code = driver_.stream_query(stream_)) == kCudaNotReady) {
      if (deadline.passed()) fail(ErrorKind::kTimeout, what, " did not finish within ", timeout_ms, " ms");
      nap();
    }
    check(driver_, code, "cuStreamQuery", " after ", what);
  }

 private:
  const CudaDriver& driver_;
  CUstream stream_ = nullptr;
};

class NcclExchange::Memory {
 public:
  Memory(const CudaDriver& driver, size_t bytes) : driver_(driver) {
    check(driver, driver.mem_alloc(&address_, bytes), "cuMemAlloc", " of ", bytes, " bytes");
  }
  ~Memory() { driver_.mem_free(address_); }
  CUdeviceptr get() const { return address_; }

 private:
  const CudaDriver& driver_;
  CUdeviceptr address_ = 0;
};

// A non-blocking communicator: every call returns at once, and the waits are ours, with a deadline.
class NcclExchange::Communicator {
 public:
  Communicator(const NcclLibrary& nccl, int timeout_ms) : nccl_(nccl), timeout_ms_(timeout_ms) {}
  ~Communicator() {
    if (comm_ == nullptr) return;
    if (!failed_ && finished()) {
      nccl_.comm_destroy(comm_);
    } else {
      nccl_.comm_abort(comm_);
    }
  }

  void init(int size, const NcclUniqueId& id, int rank) {
    NcclConfig config;
    config.blocking = 0;
    config.min_ctas = config.max_ctas = 1;  // one channel: its buffers are what a communicator costs
    run("ncclCommInitRankConfig", [&] { return nccl_.comm_init_rank_config(&comm_, size, id, rank, &config); });
  }

  void all_gather(CUdeviceptr send, CUdeviceptr receive, size_t bytes, const Stream& stream) {
    run("ncclAllGather", [&] { return nccl_.all_gather_bytes(send, receive, bytes, comm_, stream.get()); });
    failed_ = true;  // until it has ended
    stream.wait("ncclAllGather", timeout_ms_);
    failed_ = false;
  }

 private:
  template <typename Call>
  void run(const char* function, const Call& call) {
    failed_ = true;
    NcclResult result = settle(call());
    if (result == kNcclInProgress) {
      fail(ErrorKind::kTimeout, function, " did not finish within ", timeout_ms_, " ms: some rank did not take part, or NCCL can't connect");
    }
    if (result != kNcclSuccess) fail(ErrorKind::kSystem, function, " failed: ", nccl_.error_text(result, comm_));
    failed_ = false;
  }

  // Waits while the communicator is busy.
  NcclResult settle(NcclResult result) const {
    Deadline deadline(timeout_ms_);
    while (result == kNcclInProgress && comm_ != nullptr && !deadline.passed()) {
      nap();
      NcclResult code = nccl_.comm_get_async_error(comm_, &result);
      if (code != kNcclSuccess) return code;
    }
    return result;
  }

  bool finished() const { return settle(nccl_.comm_finalize(comm_)) == kNcclSuccess; }

  const NcclLibrary& nccl_;
  const int timeout_ms_;
  NcclComm comm_ = nullptr;
  bool failed_ = false;
};

NcclExchange::NcclExchange(const CudaDriver& driver, const NcclLibrary& nccl, int rank, int size,
                           const NcclExchangeOptions& options)
    : driver_(driver),
      nccl_(nccl),
      rank_(rank),
      size_(size),
      slot_bytes_(align_up(static_cast<int64_t>(options.record_bytes + sizeof(uint32_t)), kSlotAlignment)),
      timeout_ms_(options.timeout_ms) {}

NcclExchange::~NcclExchange() = default;

std::unique_ptr<NcclExchange> NcclExchange::create(const CudaDriver& driver, const NcclLibrary& nccl, Exchange& inner,
                                                   const NcclExchangeOptions& options) {
  const int rank = inner.rank(), size = inner.size();
  std::unique_ptr<NcclExchange> self(new NcclExchange(driver, nccl, rank, size, options));

  // Whatever can fail on one rank alone fails here, so that the initialisation below finds every rank in it.
  std::vector<std::string> ids = agree_gather(inner, "preparing the NCCL exchange", options.where, [&] {
    if (!options.allow_multicast) setenv("NCCL_NVLS_ENABLE", "0", /*overwrite=*/1);
    self->stream_ = std::make_unique<Stream>(driver);
    self->memory_ = std::make_unique<Memory>(driver, self->slot_bytes_ * (size + 1));
    if (rank != 0) return std::string();
    NcclUniqueId id{};
    NcclResult result = nccl.get_unique_id(&id);
    if (result != kNcclSuccess) fail(ErrorKind::kSystem, "ncclGetUniqueId failed: ", nccl.error_text(result, nullptr));
    return std::string(id.internal, sizeof(id.internal));
  });
  NcclUniqueId id{};
  MNNVL_ASSERT(ids[0].size() == sizeof(id.internal), "unique id of ", ids[0].size(), " bytes");
  std::memcpy(id.internal, ids[0].data(), sizeof(id.internal));

  self->communicator_ = std::make_unique<Communicator>(nccl, options.timeout_ms);
  agree(inner, "creating the NCCL communicator", options.where, [&] { self->communicator_->init(size, id, rank); });
  return self;
}

std::vector<std::string> NcclExchange::all_gather(const std::string& mine) {
  uint32_t length = static_cast<uint32_t>(mine.size());
  MNNVL_ASSERT(mine.size() + sizeof(length) <= slot_bytes_, "record of ", mine.size(), " bytes in slots of ", slot_bytes_);
  std::string slots(slot_bytes_ * size_, '\0');
  std::memcpy(&slots[0], &length, sizeof(length));
  std::memcpy(&slots[sizeof(length)], mine.data(), mine.size());

  CUdeviceptr send = memory_->get(), receive = send + slot_bytes_;
  check(driver_, driver_.memcpy_htod(send, slots.data(), slot_bytes_), "cuMemcpyHtoD", " of a handle record");
  communicator_->all_gather(send, receive, slot_bytes_, *stream_);
  check(driver_, driver_.memcpy_dtoh(&slots[0], receive, slots.size()), "cuMemcpyDtoH", " of the handle records");

  std::vector<std::string> records;
  for (int peer = 0; peer < size_; ++peer) {
    const char* slot = slots.data() + peer * slot_bytes_;
    std::memcpy(&length, slot, sizeof(length));
    if (length > slot_bytes_ - sizeof(length)) fail(ErrorKind::kSystem, "NCCL delivered a malformed record of rank ", peer);
    records.emplace_back(slot + sizeof(length), length);
  }
  return records;
}

}  // namespace mnnvl
