#include "system/peer_watch.h"

#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdio>
#include <utility>

#ifndef SYS_pidfd_open
#define SYS_pidfd_open 434
#endif

namespace mnnvl {
namespace {

struct ProcessState {
  char state = '?';         // as in /proc/<pid>/stat; '?' where it can't be read
  uint64_t start_time = 0;  // clock ticks since boot
};

ProcessState read_process_state(int pid) {
  ProcessState result;
  char path[64];
  std::snprintf(path, sizeof path, "/proc/%d/stat", pid);
  std::FILE* file = std::fopen(path, "re");
  if (file == nullptr) return result;
  char text[1024];
  const size_t length = std::fread(text, 1, sizeof text - 1, file);
  std::fclose(file);
  text[length] = '\0';
  // "pid (command) state ppid ...": the command may hold spaces and parentheses, so start from the last one.
  const char* field = strrchr(text, ')');
  if (field == nullptr || field[1] == '\0') return result;
  field += 2;
  result.state = *field;
  for (int i = 3; i < 22 && field != nullptr; ++i) {  // state is field 3, the start time field 22
    field = strchr(field, ' ');
    if (field != nullptr) ++field;
  }
  if (field != nullptr) result.start_time = strtoull(field, nullptr, 10);
  return result;
}

}  // namespace

PeerWatch::PeerWatch(int pid) : pid_(pid) {
  if (pid_ < 0 || pid_ == getpid()) {
    pid_ = -1;
    return;
  }
  fd_ = static_cast<int>(syscall(SYS_pidfd_open, pid_, 0));
  if (fd_ >= 0) return;
  ended_ = errno == ESRCH;
  start_time_ = read_process_state(pid_).start_time;
}

PeerWatch::~PeerWatch() {
  if (fd_ >= 0) close(fd_);
}

PeerWatch::PeerWatch(PeerWatch&& other) noexcept
    : pid_(other.pid_), fd_(std::exchange(other.fd_, -1)), ended_(other.ended_), start_time_(other.start_time_) {}

bool PeerWatch::ended() {
  if (pid_ < 0 || ended_) return ended_;
  if (fd_ >= 0) {
    pollfd entry{fd_, POLLIN, 0};
    ended_ = poll(&entry, 1, 0) == 1 && (entry.revents & POLLIN) != 0;
    return ended_;
  }
  if (kill(pid_, 0) != 0 && errno == ESRCH) {
    ended_ = true;
  } else {
    const ProcessState now = read_process_state(pid_);
    ended_ = now.state == 'Z' || now.state == 'X' ||
             (start_time_ != 0 && now.start_time != 0 && now.start_time != start_time_);
  }
  return ended_;
}

}  // namespace mnnvl
