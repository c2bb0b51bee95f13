#include "driver/nccl.h"

#include <mutex>

#include "driver/library.h"

namespace mnnvl {
namespace {

constexpr int kNcclUint8 = 1;  // ncclDataType_t

Library open_nccl(const std::string& path) {
  const char* const soname = "libnccl.so.2";
  Library library = Library::open(soname, /*only_if_loaded=*/true);
  std::string problems;
  if (!library.loaded() && !path.empty()) {
    library = Library::open(path);
    problems = library.problem();
  }
  if (!library.loaded()) {
    library = Library::open(soname);
    problems += (problems.empty() ? "" : "; ") + library.problem();
  }
  if (!library.loaded()) {
    fail(ErrorKind::kUnsupported, "NCCL, which carries the memory handles at set-up, can't be loaded: ", problems,
         "; install it, or set bootstrap=\"store\"");
  }
  return library;
}

class RealNccl final : public NcclLibrary {
 public:
  explicit RealNccl(const Library& library) {
    bool complete =
        library.resolve(&get_version_, "ncclGetVersion") && library.resolve(&get_unique_id_, "ncclGetUniqueId") &&
        library.resolve(&comm_init_rank_config_, "ncclCommInitRankConfig") &&
        library.resolve(&comm_get_async_error_, "ncclCommGetAsyncError") &&
        library.resolve(&comm_finalize_, "ncclCommFinalize") && library.resolve(&comm_destroy_, "ncclCommDestroy") &&
        library.resolve(&comm_abort_, "ncclCommAbort") && library.resolve(&all_gather_, "ncclAllGather") &&
        library.resolve(&get_error_string_, "ncclGetErrorString");
    library.resolve(&get_last_error_, "ncclGetLastError");
    if (get_version_ != nullptr) get_version_(&version_);
    if (!complete || version_ < kNcclOldestVersion) {
      fail(ErrorKind::kUnsupported, "NCCL ", version_ / 10000, ".", version_ / 100 % 100,
           " is too old: 2.18 or newer is needed to exchange memory handles; or set bootstrap=\"store\"");
    }
  }

  int version() const override { return version_; }
  NcclResult get_unique_id(NcclUniqueId* id) const override { return get_unique_id_(id); }
  NcclResult comm_init_rank_config(NcclComm* comm, int world_size, NcclUniqueId id, int rank,
                                   NcclConfig* config) const override {
    return comm_init_rank_config_(comm, world_size, id, rank, config);
  }
  NcclResult comm_get_async_error(NcclComm comm, NcclResult* result) const override {
    return comm_get_async_error_(comm, result);
  }
  NcclResult comm_finalize(NcclComm comm) const override { return comm_finalize_(comm); }
  NcclResult comm_destroy(NcclComm comm) const override { return comm_destroy_(comm); }
  NcclResult comm_abort(NcclComm comm) const override { return comm_abort_(comm); }
  NcclResult all_gather_bytes(CUdeviceptr send, CUdeviceptr receive, size_t bytes, NcclComm comm,
                              CUstream stream) const override {
    return all_gather_(reinterpret_cast<const void*>(send), reinterpret_cast<void*>(receive), bytes, kNcclUint8, comm,
                       stream);
  }
  std::string error_text(NcclResult result, NcclComm comm) const override {
    const char* detail = get_last_error_ != nullptr ? get_last_error_(comm) : nullptr;
    std::string text = get_error_string_(result);
    if (detail != nullptr && *detail != '\0') text += str(": ", detail);
    return text;
  }

 private:
  int version_ = 0;
  NcclResult (*get_version_)(int*) = nullptr;
  NcclResult (*get_unique_id_)(NcclUniqueId*) = nullptr;
  NcclResult (*comm_init_rank_config_)(NcclComm*, int, NcclUniqueId, int, NcclConfig*) = nullptr;
  NcclResult (*comm_get_async_error_)(NcclComm, NcclResult*) = nullptr;
  NcclResult (*comm_finalize_)(NcclComm) = nullptr;
  NcclResult (*comm_destroy_)(NcclComm) = nullptr;
  NcclResult (*comm_abort_)(NcclComm) = nullptr;
  NcclResult (*all_gather_)(const void*, void*, size_t, int, NcclComm, CUstream) = nullptr;
  const char* (*get_error_string_)(NcclResult) = nullptr;
  const char* (*get_last_error_)(NcclComm) = nullptr;
};

}  // namespace

const NcclLibrary& load_nccl(const std::string& path) {
  static std::mutex mutex;
  static const NcclLibrary* library = nullptr;  // leaked: NCCL's threads outlive static destruction
  std::lock_guard<std::mutex> lock(mutex);
  if (library == nullptr) library = new RealNccl(open_nccl(path));
  return *library;
}

}  // namespace mnnvl
