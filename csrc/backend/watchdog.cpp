#include "backend/watchdog.h"

#include <poll.h>
#include <sys/eventfd.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>

#include "common/error.h"

namespace mnnvl {
namespace {
constexpr int kPeriodMs = 50;  // how late a recorded failure may be noticed; a death wakes the thread at once
}

Watchdog::Watchdog(HostMailbox* mailbox, const std::vector<int>& peer_pids, std::function<void()> on_failure)
    : mailbox_(mailbox), on_failure_(std::move(on_failure)), stop_fd_(eventfd(0, EFD_CLOEXEC)) {
  if (stop_fd_ < 0) fail_errno(errno, "mnnvl: cannot create an eventfd");
  for (size_t r = 0; r < peer_pids.size(); ++r) {
    if (peer_pids[r] < 0) continue;
    const int pidfd = int(syscall(SYS_pidfd_open, peer_pids[r], 0));
    if (pidfd >= 0) {
      peers_.push_back({int(r), pidfd});
    } else if (errno == ESRCH) {
      mark_dead(int(r));
    }  // any other error: this kernel can't watch processes, the deadline still holds
  }
  thread_ = std::thread([this] { run(); });
}

Watchdog::~Watchdog() {
  const uint64_t one = 1;
  while (write(stop_fd_, &one, sizeof one) < 0 && errno == EINTR) {
  }
  thread_.join();
  for (const Peer& peer : peers_) close(peer.pidfd);
  close(stop_fd_);
}

void Watchdog::mark_dead(int rank) {
  __atomic_fetch_or(&mailbox_->dead_ranks[rank / 32], 1u << (rank % 32), __ATOMIC_RELEASE);
  int none = -1;
  dead_rank_.compare_exchange_strong(none, rank);
}

void Watchdog::run() {
  bool reported = false;
  for (;;) {
    std::vector<pollfd> fds{{stop_fd_, POLLIN, 0}};
    for (const Peer& peer : peers_) fds.push_back({peer.pidfd, POLLIN, 0});
    if (poll(fds.data(), fds.size(), kPeriodMs) < 0 && errno != EINTR) return;
    if (fds[0].revents != 0) return;
    for (size_t i = fds.size() - 1; i > 0; --i) {
      if (fds[i].revents == 0) continue;
      mark_dead(peers_[i - 1].rank);
      close(peers_[i - 1].pidfd);
      peers_.erase(peers_.begin() + long(i) - 1);
    }
    if (!reported && __atomic_load_n(&mailbox_->record.valid, __ATOMIC_ACQUIRE) != 0) {
      reported = true;
      on_failure_();
    }
  }
}

}  // namespace mnnvl
