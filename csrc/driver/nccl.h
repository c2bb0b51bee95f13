// libnccl as an abstract table: the real one is loaded at run time (nccl.cpp), the test double is fake_nccl.h.
// Methods are named after NCCL's functions, return its result codes, and do not throw.
#pragma once

#include <climits>
#include <cstddef>
#include <cstdint>
#include <string>

#include "common/error.h"
#include "driver/cuda_types.h"

namespace mnnvl {

using NcclResult = int;
using NcclComm = void*;
constexpr NcclResult kNcclSuccess = 0;
constexpr NcclResult kNcclInternalError = 3;
constexpr NcclResult kNcclInvalidUsage = 5;
constexpr NcclResult kNcclInProgress = 7;

struct NcclUniqueId {
  char internal[128];
};

// ncclConfig_t as of 2.18; newer libraries read as many bytes as `size` says and take defaults for the rest.
struct NcclConfig {
  size_t size = sizeof(NcclConfig);
  unsigned int magic = 0xcafebeef;
  unsigned int version = 21800;
  int blocking = INT_MIN;
  int cga_cluster_size = INT_MIN;
  int min_ctas = INT_MIN;
  int max_ctas = INT_MIN;
  const char* net_name = nullptr;
  int split_share = INT_MIN;
};
static_assert(sizeof(NcclConfig) == 48 && offsetof(NcclConfig, net_name) == 32 &&
              offsetof(NcclConfig, split_share) == 40);
constexpr int kNcclOldestVersion = 21800;

class NcclLibrary {
 public:
  virtual ~NcclLibrary() = default;
  virtual int version() const = 0;  // 22809 for 2.28.9
  virtual NcclResult get_unique_id(NcclUniqueId* id) const = 0;
  virtual NcclResult comm_init_rank_config(NcclComm* comm, int world_size, NcclUniqueId id, int rank,
                                           NcclConfig* config) const = 0;
  virtual NcclResult comm_get_async_error(NcclComm comm, NcclResult* result) const = 0;
  virtual NcclResult comm_finalize(NcclComm comm) const = 0;
  virtual NcclResult comm_destroy(NcclComm comm) const = 0;
  virtual NcclResult comm_abort(NcclComm comm) const = 0;
  virtual NcclResult all_gather_bytes(CUdeviceptr send, CUdeviceptr receive, size_t bytes, NcclComm comm,
                                      CUstream stream) const = 0;
  virtual std::string error_text(NcclResult result, NcclComm comm) const = 0;  // with ncclGetLastError
};

// The process's libnccl: the one already loaded (torch's), else `path` if not empty, else what the loader finds.
// Loaded at the first call that succeeds and never unloaded. Throws Error(kUnsupported) when there is none, or it is
// older than 2.18.
const NcclLibrary& load_nccl(const std::string& path);

}  // namespace mnnvl
