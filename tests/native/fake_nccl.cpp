#include "native/fake_nccl.h"

#include <cstring>

namespace mnnvl::fake {
namespace {

struct Communicator {
  std::shared_ptr<CommunicatorGroup> group;
  int rank;
};

class FakeNccl final : public NcclLibrary {
 public:
  FakeNccl(std::shared_ptr<World> world, int rank) : world_(std::move(world)), rank_(rank) {}

  int version() const override { return 22809; }

  NcclResult get_unique_id(NcclUniqueId* id) const override {
    if (auto code = world_->enter(rank_, "ncclGetUniqueId")) return *code;
    std::lock_guard<std::mutex> lock(world_->mutex);
    std::string name = str("group ", ++world_->next_handle);
    world_->groups[name] = std::make_shared<CommunicatorGroup>();
    std::memset(id->internal, 0, sizeof(id->internal));
    std::memcpy(id->internal, name.data(), name.size());
    return kNcclSuccess;
  }

  NcclResult comm_init_rank_config(NcclComm* comm, int size, NcclUniqueId id, int rank,
                                   NcclConfig* config) const override {
    if (auto code = world_->enter(rank_, "ncclCommInitRankConfig")) return *code;
    std::lock_guard<std::mutex> lock(world_->mutex);
    auto group = world_->groups.find(id.internal);
    if (group == world_->groups.end() || config->magic != 0xcafebeef || config->max_ctas != 1) return kNcclInvalidUsage;
    group->second->size = size;
    group->second->sent.resize(size);
    group->second->members[rank] = world_->device(rank_).id;
    *comm = new Communicator{group->second, rank};
    ++world_->communicators;
    return kNcclInProgress;
  }

  NcclResult comm_get_async_error(NcclComm comm, NcclResult* result) const override {
    if (auto code = world_->enter(rank_, "ncclCommGetAsyncError")) return *code;
    std::lock_guard<std::mutex> lock(world_->mutex);
    const CommunicatorGroup& group = *static_cast<Communicator*>(comm)->group;
    bool complete = static_cast<int>(group.members.size()) == group.size;
    *result = !complete ? kNcclInProgress : group.shared_device() ? kNcclInvalidUsage : kNcclSuccess;
    return kNcclSuccess;
  }

  NcclResult comm_finalize(NcclComm) const override {
    return world_->enter(rank_, "ncclCommFinalize").value_or(kNcclSuccess);
  }
  NcclResult comm_destroy(NcclComm comm) const override { return drop("ncclCommDestroy", comm); }
  NcclResult comm_abort(NcclComm comm) const override { return drop("ncclCommAbort", comm); }

  NcclResult all_gather_bytes(CUdeviceptr send, CUdeviceptr receive, size_t bytes, NcclComm comm,
                              CUstream stream) const override {
    if (auto code = world_->enter(rank_, "ncclAllGather")) return *code;
    std::lock_guard<std::mutex> lock(world_->mutex);
    auto* communicator = static_cast<Communicator*>(comm);
    communicator->group->sent[communicator->rank].emplace(reinterpret_cast<const char*>(send), bytes);
    world_->streams[stream] = {communicator->group, receive};
    return kNcclSuccess;
  }

  std::string error_text(NcclResult result, NcclComm) const override { return str("simulated NCCL error ", result); }

 private:
  NcclResult drop(const char* function, NcclComm comm) const {
    auto code = world_->enter(rank_, function);
    std::lock_guard<std::mutex> lock(world_->mutex);
    delete static_cast<Communicator*>(comm);
    --world_->communicators;
    return code.value_or(kNcclSuccess);
  }

  const std::shared_ptr<World> world_;
  const int rank_;
};

}  // namespace

std::unique_ptr<NcclLibrary> make_nccl(std::shared_ptr<World> world, int rank) {
  return std::make_unique<FakeNccl>(std::move(world), rank);
}

bool finish_all_gather(World::Pending* pending) {
  if (pending->group == nullptr) return true;
  for (const auto& part : pending->group->sent) {
    if (!part) return false;
  }
  char* to = reinterpret_cast<char*>(pending->receive);
  for (const auto& part : pending->group->sent) {
    std::memcpy(to, part->data(), part->size());
    to += part->size();
  }
  pending->group.reset();
  return true;
}

}  // namespace mnnvl::fake
