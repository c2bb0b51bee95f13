#include "transport/watchdog.h"

#include <chrono>

namespace mnnvl {
namespace {
static_assert(sizeof(HostMailbox::dead_ranks) * 8 >= kMaxWorldSize, "a bit for each rank");
constexpr auto kPeriod = std::chrono::milliseconds(50);  // how late a death or a failure may be noticed
}  // namespace

Watchdog::Watchdog(HostMailbox* mailbox, const std::vector<int>& peer_pids, std::function<void()> on_failure)
    : mailbox_(mailbox), on_failure_(std::move(on_failure)), dead_(peer_pids.size()) {
  for (int pid : peer_pids) peers_.emplace_back(pid);
  thread_ = std::thread([this] { run(); });
}

Watchdog::~Watchdog() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
  }
  stop_requested_.notify_all();
  thread_.join();
}

void Watchdog::run() {
  std::unique_lock<std::mutex> lock(mutex_);
  while (!stop_requested_.wait_for(lock, kPeriod, [this] { return stop_; })) look();
  look();  // what failed last must not go unsaid
}

void Watchdog::look() {
  for (size_t rank = 0; rank < peers_.size(); ++rank) {
    if (dead_[rank] || !peers_[rank].ended()) continue;
    dead_[rank] = true;
    __atomic_fetch_or(&mailbox_->dead_ranks[rank / 32], 1u << (rank % 32), __ATOMIC_RELEASE);
    int none = -1;
    dead_rank_.compare_exchange_strong(none, static_cast<int>(rank));
  }
  if (!reported_ && __atomic_load_n(&mailbox_->record.valid, __ATOMIC_ACQUIRE) != 0) {
    reported_ = true;
    on_failure_();
  }
}

}  // namespace mnnvl
