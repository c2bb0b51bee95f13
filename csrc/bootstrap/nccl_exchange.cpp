#include "bootstrap/nccl_exchange.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <thread>

#include "bootstrap/agreement.h"
#include "common/math.h"
#include "system/deadline.h"

namespace mnnvl {
namespace {

constexpr int64_t kSlotAlignment = 16;
constexpr int kRoundMs = 500;  // how long a rank waits before it looks whether another has failed
const char kStage[] = "exchanging memory handles over NCCL";

}  // namespace

class NcclExchange::Stream {
 public:
  explicit Stream(const CudaDriver& driver) : driver_(driver) {
    // Flags 0: ordered with the legacy stream on which cuMemcpyHtoD finishes its copy.
    check(driver, driver.stream_create(&stream_, 0), "cuStreamCreate");
  }
  ~Stream() { driver_.stream_destroy(stream_); }
  CUstream get() const { return stream_; }

  bool idle() const {
    CUresult code = driver_.stream_query(stream_);
    if (code == kCudaNotReady) return false;
    check(driver_, code, "cuStreamQuery", " after ncclAllGather");
    return true;
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

// A non-blocking communicator: every call returns at once, and the waits are ours.
class NcclExchange::Communicator {
 public:
  Communicator(const NcclLibrary& nccl, int64_t timeout_ms) : nccl_(nccl), timeout_ms_(timeout_ms) {}
  ~Communicator() {
    if (comm_ == nullptr) return;
    if (sound_ && finalised()) {
      nccl_.comm_destroy(comm_);
    } else {
      nccl_.comm_abort(comm_);
    }
  }

  void init(int size, const NcclUniqueId& id, int rank) {
    NcclConfig config;
    config.blocking = 0;
    config.min_ctas = config.max_ctas = 1;  // one channel: its buffers are what a communicator costs
    start("ncclCommInitRankConfig", nccl_.comm_init_rank_config(&comm_, size, id, rank, &config));
  }

  void all_gather(CUdeviceptr send, CUdeviceptr receive, size_t bytes, const Stream& stream) {
    start("ncclAllGather", nccl_.all_gather_bytes(send, receive, bytes, comm_, stream.get()));
  }

  // False while the call that was started last is not through.
  bool settled() const {
    NcclResult result = kNcclSuccess;
    NcclResult code = nccl_.comm_get_async_error(comm_, &result);
    if (code == kNcclSuccess) code = result;
    if (code != kNcclSuccess && code != kNcclInProgress) raise(code);
    return code == kNcclSuccess;
  }

  void set_sound(bool sound) { sound_ = sound; }

 private:
  void start(const char* function, NcclResult result) {
    sound_ = false;
    function_ = function;
    if (result != kNcclSuccess && result != kNcclInProgress) raise(result);
  }
  [[noreturn]] void raise(NcclResult result) const {
    fail(ErrorKind::kSystem, function_, " failed: ", nccl_.error_text(result, comm_));
  }

  bool finalised() const {
    NcclResult result = nccl_.comm_finalize(comm_);
    for (Deadline deadline(timeout_ms_); result == kNcclInProgress && !deadline.passed();) {
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
      if (nccl_.comm_get_async_error(comm_, &result) != kNcclSuccess) return false;
    }
    return result == kNcclSuccess;
  }

  const NcclLibrary& nccl_;
  const int64_t timeout_ms_;
  NcclComm comm_ = nullptr;
  const char* function_ = "";
  bool sound_ = false;  // nothing under way, nothing failed: to be destroyed rather than aborted
};

NcclExchange::NcclExchange(const CudaDriver& driver, Exchange& inner, const NcclExchangeOptions& options)
    : driver_(driver),
      inner_(inner),
      where_(options.where),
      rank_(inner.rank()),
      size_(inner.size()),
      slot_bytes_(align_up(static_cast<int64_t>(options.record_bytes + sizeof(uint32_t)), kSlotAlignment)),
      timeout_ms_(options.timeout_ms) {}

NcclExchange::~NcclExchange() = default;

// Waits until `ready` holds on every rank, in short rounds that end in an agreement: what NCCL does on one rank after
// the other has failed (wait, mostly) then ends for both.
template <typename Ready>
void NcclExchange::wait_together(const std::string& stage, const Ready& ready) {
  Deadline deadline(timeout_ms_);
  bool all_ready = false;
  while (!all_ready) {
    std::vector<std::string> states = agree_gather(inner_, stage, where_, [&] {
      Deadline round(kRoundMs);
      while (!ready()) {
        if (deadline.passed()) {
          fail(ErrorKind::kTimeout, "NCCL did not finish within ", timeout_ms_,
               " ms: can the ranks reach each other over its network (NCCL_SOCKET_IFNAME, NCCL_DEBUG=INFO)?");
        }
        if (round.passed()) return std::string("busy");
        std::this_thread::sleep_for(std::chrono::microseconds(200));
      }
      return std::string("ready");
    });
    all_ready = std::all_of(states.begin(), states.end(), [](const std::string& state) { return state == "ready"; });
  }
}

std::unique_ptr<NcclExchange> NcclExchange::create(const CudaDriver& driver, const NcclLibrary& nccl, Exchange& inner,
                                                   const NcclExchangeOptions& options) {
  std::unique_ptr<NcclExchange> self(new NcclExchange(driver, inner, options));

  // Whatever can fail on one rank alone fails here, so that the initialisation below finds every rank in it.
  std::vector<std::string> ids = agree_gather(inner, "preparing the NCCL exchange", options.where, [&] {
    self->stream_ = std::make_unique<Stream>(driver);
    self->memory_ = std::make_unique<Memory>(driver, self->slot_bytes_ * (self->size_ + 1));
    if (self->rank_ != 0) return std::string();
    NcclUniqueId id{};
    NcclResult result = nccl.get_unique_id(&id);
    if (result != kNcclSuccess) fail(ErrorKind::kSystem, "ncclGetUniqueId failed: ", nccl.error_text(result, nullptr));
    return std::string(id.internal, sizeof(id.internal));
  });
  NcclUniqueId id{};
  MNNVL_ASSERT(ids[0].size() == sizeof(id.internal), "unique id of ", ids[0].size(), " bytes");
  std::memcpy(id.internal, ids[0].data(), sizeof(id.internal));

  const std::string stage = "creating the NCCL communicator";
  self->communicator_ = std::make_unique<Communicator>(nccl, options.timeout_ms);
  agree(inner, stage, options.where, [&] { self->communicator_->init(self->size_, id, self->rank_); });
  self->wait_together(stage, [&] { return self->communicator_->settled(); });
  self->communicator_->set_sound(true);
  return self;
}

std::vector<std::string> NcclExchange::all_gather(const std::string& mine) {
  const uint32_t length = static_cast<uint32_t>(mine.size());
  std::string slots(slot_bytes_ * size_, '\0');
  CUdeviceptr send = memory_->get(), receive = send + slot_bytes_;
  agree(inner_, kStage, where_, [&] {
    MNNVL_ASSERT(mine.size() + sizeof(length) <= slot_bytes_, "record of ", mine.size(), " bytes in slots of ",
                 slot_bytes_);
    std::memcpy(&slots[0], &length, sizeof(length));
    std::memcpy(&slots[sizeof(length)], mine.data(), mine.size());
    check(driver_, driver_.memcpy_htod(send, slots.data(), slot_bytes_), "cuMemcpyHtoD", " of a handle record");
    communicator_->all_gather(send, receive, slot_bytes_, *stream_);
  });
  wait_together(kStage, [&] { return communicator_->settled() && stream_->idle(); });
  communicator_->set_sound(true);

  std::vector<std::string> records;
  agree(inner_, kStage, where_, [&] {
    check(driver_, driver_.memcpy_dtoh(&slots[0], receive, slots.size()), "cuMemcpyDtoH", " of the handle records");
    for (int peer = 0; peer < size_; ++peer) records.push_back(unpack(slots, peer));
  });
  return records;
}

std::string NcclExchange::unpack(const std::string& slots, int peer) const {
  const char* slot = slots.data() + peer * slot_bytes_;
  uint32_t length;
  std::memcpy(&length, slot, sizeof(length));
  if (length > slot_bytes_ - sizeof(length))
    fail(ErrorKind::kSystem, "NCCL delivered a malformed record of rank ", peer);
  return std::string(slot + sizeof(length), length);
}

}  // namespace mnnvl
