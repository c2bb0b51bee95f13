#include "bootstrap/fd_message.h"

#include <errno.h>
#include <sys/socket.h>

#include <cstring>

#include "common/error.h"

namespace mnnvl {
namespace {

constexpr char kMagic[8] = {'m', 'n', 'n', 'v', 'l', 'f', 'd', '2'};

struct Wire {
  char magic[8];
  int32_t rank;
  int32_t has_fd;
  char token[kTokenBytes];
};

// Everything that came is owned at once.
std::vector<UniqueFd> take_descriptors(msghdr* header) {
  std::vector<UniqueFd> fds;
  for (cmsghdr* c = CMSG_FIRSTHDR(header); c != nullptr; c = CMSG_NXTHDR(header, c)) {
    if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS) continue;
    for (size_t at = 0; at + sizeof(int) <= c->cmsg_len - CMSG_LEN(0); at += sizeof(int)) {
      int fd;
      std::memcpy(&fd, CMSG_DATA(c) + at, sizeof(int));
      fds.emplace_back(fd);
    }
  }
  return fds;
}

}  // namespace

bool send_fd_message(int connection, int peer, int rank, const std::string& token, int fd) {
  Wire wire{};
  std::memcpy(wire.magic, kMagic, sizeof(kMagic));
  wire.rank = rank;
  wire.has_fd = fd >= 0;
  std::memcpy(wire.token, token.data(), kTokenBytes);
  iovec data{&wire, sizeof(wire)};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
  msghdr header{};
  header.msg_iov = &data;
  header.msg_iovlen = 1;
  if (fd >= 0) {
    header.msg_control = control;
    header.msg_controllen = sizeof(control);
    cmsghdr* rights = CMSG_FIRSTHDR(&header);
    rights->cmsg_level = SOL_SOCKET;
    rights->cmsg_type = SCM_RIGHTS;
    rights->cmsg_len = CMSG_LEN(sizeof(int));
    std::memcpy(CMSG_DATA(rights), &fd, sizeof(int));
  }
  ssize_t sent;
  do {
    sent = sendmsg(connection, &header, MSG_NOSIGNAL);
  } while (sent < 0 && errno == EINTR);
  if (sent < 0 && (errno == EPIPE || errno == ECONNRESET)) return false;
  // Linux lets a user have as many descriptors on their way as a process may have open; large worlds send more at once.
  if (sent < 0 && errno == ETOOMANYREFS) return false;
  if (sent < 0) fail_errno(errno, "sendmsg of a descriptor to rank ", peer);
  return true;
}

Received receive_fd_message(int connection, const Expected& expected, FdMessage* message) {
  Wire wire{};
  iovec data{&wire, sizeof(wire)};
  msghdr header{};
  header.msg_iov = &data;
  header.msg_iovlen = 1;
  // No room for descriptors, so the kernel makes none here.
  const ssize_t seen = recvmsg(connection, &header, MSG_PEEK);
  if (seen < 0) return errno == EAGAIN || errno == EINTR ? Received::kNothingYet : Received::kRubbish;
  const bool ours = seen == static_cast<ssize_t>(sizeof(wire)) && (header.msg_flags & MSG_TRUNC) == 0 &&
                    std::memcmp(wire.magic, kMagic, sizeof(kMagic)) == 0 && (wire.has_fd == 0 || wire.has_fd == 1);
  if (!ours || !expected(wire.rank, std::string(wire.token, kTokenBytes))) return Received::kRubbish;

  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
  header.msg_control = control;
  header.msg_controllen = sizeof(control);
  const ssize_t got = recvmsg(connection, &header, MSG_CMSG_CLOEXEC);
  if (got < 0) return errno == EAGAIN || errno == EINTR ? Received::kNothingYet : Received::kRubbish;
  message->fds = take_descriptors(&header);
  message->rank = wire.rank;
  message->has_fd = wire.has_fd != 0;
  message->truncated = (header.msg_flags & MSG_CTRUNC) != 0;
  return Received::kMessage;
}

}  // namespace mnnvl
