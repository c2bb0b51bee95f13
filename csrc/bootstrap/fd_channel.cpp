#include "bootstrap/fd_channel.h"

#include <errno.h>
#include <poll.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/un.h>

#include <cstddef>
#include <cstring>

#include "system/deadline.h"
#include "common/error.h"

namespace mnnvl {
namespace {

constexpr char kMagic[8] = {'m', 'n', 'n', 'v', 'l', 'f', 'd', '1'};
constexpr size_t kNameBytes = 32;  // hexadecimal digits of 128 bits

struct Message {
  char magic[8];
  int32_t rank;
  int32_t has_fd;
  char sender[kNameBytes];  // the sender's own address, which only the group knows together with its rank
};

std::string random_name() {
  unsigned char bits[kNameBytes / 2];
  if (getrandom(bits, sizeof(bits), 0) != static_cast<ssize_t>(sizeof(bits))) fail_errno(errno, "getrandom");
  std::string name;
  for (unsigned char b : bits) {
    name += "0123456789abcdef"[b >> 4];
    name += "0123456789abcdef"[b & 15];
  }
  return name;
}

// An abstract address: a leading zero byte, then the name, no terminator.
socklen_t make_address(const std::string& name, sockaddr_un* address) {
  static const std::string prefix = "mnnvl-";
  std::string full = prefix + name;
  MNNVL_ASSERT(full.size() + 1 <= sizeof(address->sun_path), "socket name of ", full.size(), " bytes");
  std::memset(address, 0, sizeof(*address));
  address->sun_family = AF_UNIX;
  std::memcpy(address->sun_path + 1, full.data(), full.size());
  return static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + full.size());
}

UniqueFd open_socket() {
  UniqueFd fd(socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!fd) fail_errno(errno, "socket for passing descriptors");
  return fd;
}

bool same_user(int fd) {
  ucred credentials{};
  socklen_t length = sizeof(credentials);
  return getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &credentials, &length) == 0 && credentials.uid == geteuid();
}

// One rank's side of the exchange. Every send precedes every receive, on connections that the peers' backlogs
// complete, so no order of ranks can deadlock; what remains is to wait for the peers' messages.
class Session {
 public:
  Session(int rank, const std::vector<std::string>& addresses, int listener, const Deadline& deadline)
      : rank_(rank),
        size_(static_cast<int>(addresses.size())),
        addresses_(addresses),
        listener_(listener),
        deadline_(deadline),
        outgoing_(size_),
        received_(size_),
        done_(size_, false) {
    done_[rank] = true;
  }

  void send_to_all(int fd) {
    for (int peer = 0; peer < size_; ++peer) {
      if (peer != rank_) send_to(peer, fd);
    }
  }

  std::vector<UniqueFd> receive_from_all() {
    while (missing() >= 0) {
      wait();
      // A peer closes its end only after it has sent to all, or after it failed. So whoever hung up is looked at
      // after everything that had arrived by then was read.
      std::vector<int> closed = hung_up();
      accept_all();
      read_all();
      for (int peer : closed) {
        if (!done_[peer])
          fail(ErrorKind::kPeerFailed, "rank ", peer, " closed its socket before it had sent its descriptor");
      }
      if (missing() >= 0 && deadline_.passed()) time_out("descriptors");
    }
    return std::move(received_);
  }

 private:
  int missing() const {
    for (int peer = 0; peer < size_; ++peer) {
      if (!done_[peer]) return peer;
    }
    return -1;
  }

  [[noreturn]] void time_out(const char* what) const {
    std::string ranks;
    for (int peer = 0; peer < size_; ++peer) {
      if (!done_[peer]) ranks += str(ranks.empty() ? "" : ", ", peer);
    }
    fail(ErrorKind::kTimeout, "no ", what, " from rank(s) ", ranks, " within ", deadline_.timeout_ms(), " ms");
  }

  void send_to(int peer, int fd) {
    UniqueFd connection = connect_to(peer);
    if (!same_user(connection.get())) {
      fail(ErrorKind::kSystem, "rank ", peer, "'s socket belongs to another user (this rank's uid is ", geteuid(),
           "); descriptors are passed only between processes of one user");
    }
    Message message{};
    std::memcpy(message.magic, kMagic, sizeof(kMagic));
    message.rank = rank_;
    message.has_fd = fd >= 0;
    std::memcpy(message.sender, addresses_[rank_].data(), kNameBytes);
    iovec data{&message, sizeof(message)};
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
      sent = sendmsg(connection.get(), &header, MSG_NOSIGNAL);
    } while (sent < 0 && errno == EINTR);
    if (sent < 0 && (errno == EPIPE || errno == ECONNRESET)) {
      fail(ErrorKind::kPeerFailed, "rank ", peer, " closed its socket early");
    }
    if (sent < 0) fail_errno(errno, "sendmsg of a descriptor to rank ", peer);
    outgoing_[peer] = std::move(connection);
  }

  UniqueFd connect_to(int peer) {
    sockaddr_un address;
    socklen_t length = make_address(addresses_[peer], &address);
    for (;;) {
      UniqueFd connection = open_socket();
      if (connect(connection.get(), reinterpret_cast<sockaddr*>(&address), length) == 0) return connection;
      if (errno == ECONNREFUSED) {
        fail(ErrorKind::kPeerFailed, "rank ", peer,
             "'s socket is gone: it failed first, or runs in another network namespace");
      }
      // EAGAIN: the peer's backlog is full for the moment.
      if (errno != EAGAIN && errno != EINTR) fail_errno(errno, "connect to rank ", peer);
      if (deadline_.passed()) time_out("room in the backlog, and no descriptors,");
      poll(nullptr, 0, deadline_.left_ms(2));
    }
  }

  void wait() {
    std::vector<pollfd> fds{{listener_, POLLIN, 0}};
    for (const UniqueFd& fd : incoming_) fds.push_back({fd.get(), POLLIN, 0});
    for (int peer = 0; peer < size_; ++peer) {
      if (outgoing_[peer] && !done_[peer]) fds.push_back({outgoing_[peer].get(), 0, 0});  // hang-ups only
    }
    if (poll(fds.data(), fds.size(), deadline_.left_ms(1000)) < 0 && errno != EINTR) fail_errno(errno, "poll");
  }

  std::vector<int> hung_up() const {
    std::vector<int> peers;
    for (int peer = 0; peer < size_; ++peer) {
      if (!outgoing_[peer] || done_[peer]) continue;
      pollfd fd{outgoing_[peer].get(), 0, 0};
      if (poll(&fd, 1, 0) > 0 && (fd.revents & (POLLHUP | POLLERR)) != 0) peers.push_back(peer);
    }
    return peers;
  }

  void accept_all() {
    for (;;) {
      UniqueFd connection(accept4(listener_, nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
      if (connection) {
        if (same_user(connection.get())) incoming_.push_back(std::move(connection));
        continue;
      }
      if (errno == EAGAIN) return;
      if (errno != EINTR && errno != ECONNABORTED) fail_errno(errno, "accept of a peer's descriptor");
    }
  }

  void read_all() {
    std::vector<UniqueFd> unread;
    for (UniqueFd& connection : incoming_) {
      if (!read_one(connection.get())) unread.push_back(std::move(connection));
    }
    incoming_ = std::move(unread);
  }

  // True when the connection has nothing more to say: its message was taken, or it was not one of ours.
  bool read_one(int connection) {
    Message message{};
    iovec data{&message, sizeof(message)};
    alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
    msghdr header{};
    header.msg_iov = &data;
    header.msg_iovlen = 1;
    header.msg_control = control;
    header.msg_controllen = sizeof(control);
    ssize_t got = recvmsg(connection, &header, MSG_CMSG_CLOEXEC);
    if (got < 0 && (errno == EAGAIN || errno == EINTR)) return false;
    std::vector<UniqueFd> fds = take_descriptors(&header);
    int peer = message.rank;
    bool ours = got == static_cast<ssize_t>(sizeof(message)) &&
                std::memcmp(message.magic, kMagic, sizeof(kMagic)) == 0 && peer >= 0 && peer < size_ && !done_[peer] &&
                addresses_[peer].compare(0, kNameBytes, message.sender, kNameBytes) == 0;
    if (!ours) return true;
    if (message.has_fd != 0 && (fds.size() != 1 || (header.msg_flags & MSG_CTRUNC) != 0)) {
      fail(ErrorKind::kSystem, "rank ", peer,
           "'s descriptor was lost on the way: is this process at its limit of open files (ulimit -n)?");
    }
    if (message.has_fd != 0) received_[peer] = std::move(fds[0]);
    done_[peer] = true;
    return true;
  }

  // Everything that came is owned at once, also what is then found to be unwanted.
  static std::vector<UniqueFd> take_descriptors(msghdr* header) {
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

  const int rank_;
  const int size_;
  const std::vector<std::string>& addresses_;
  const int listener_;
  const Deadline& deadline_;
  std::vector<UniqueFd> outgoing_;  // by rank; kept open so that a peer's end is seen
  std::vector<UniqueFd> incoming_;  // accepted, not yet read
  std::vector<UniqueFd> received_;  // by rank
  std::vector<bool> done_;          // by rank
};

}  // namespace

FdChannel::FdChannel(int world_size) : listener_(open_socket()), address_(random_name()) {
  sockaddr_un address;
  socklen_t length = make_address(address_, &address);
  if (bind(listener_.get(), reinterpret_cast<sockaddr*>(&address), length) != 0) {
    fail_errno(errno, "bind of the socket for passing descriptors");
  }
  if (listen(listener_.get(), world_size + 8) != 0) fail_errno(errno, "listen on the socket for passing descriptors");
}

std::vector<UniqueFd> FdChannel::exchange(int rank, const std::vector<std::string>& addresses, int fd, int timeout_ms) {
  UniqueFd listener = std::move(listener_);
  MNNVL_ASSERT(listener && rank >= 0 && rank < static_cast<int>(addresses.size()),
               "FdChannel::exchange is called once, by a rank");
  for (const std::string& address : addresses) {
    if (address.size() != kNameBytes)
      fail(ErrorKind::kSystem, "a peer's socket name has ", address.size(), " bytes, not ", kNameBytes);
  }
  Deadline deadline(timeout_ms);
  Session session(rank, addresses, listener.get(), deadline);
  session.send_to_all(fd);
  return session.receive_from_all();
}

}  // namespace mnnvl
