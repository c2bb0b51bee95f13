// Notices that another process of this host has ended.
#pragma once

#include <cstdint>

namespace mnnvl {

// Owns one pidfd. Where the kernel or a sandbox refuses pidfd_open, it compares the process's start time in /proc
// instead, so that a reused pid isn't taken for the peer. Not thread-safe, except that distinct objects are
// independent.
class PeerWatch {
 public:
  // pid < 0 and the caller's own pid are not watched: ended() is then always false. A pid that doesn't exist has ended.
  explicit PeerWatch(int pid);
  ~PeerWatch();
  PeerWatch(PeerWatch&& other) noexcept;
  PeerWatch(const PeerWatch&) = delete;
  PeerWatch& operator=(const PeerWatch&) = delete;

  // A system call or two; never blocks. A zombie has ended.
  bool ended();
  int pid() const { return pid_; }

 private:
  int pid_;
  int fd_ = -1;
  bool ended_ = false;
  uint64_t start_time_ = 0;  // 0: unknown
};

}  // namespace mnnvl
