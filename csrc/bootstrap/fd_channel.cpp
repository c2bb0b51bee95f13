#include "bootstrap/fd_channel.h"

#include <errno.h>
#include <poll.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/un.h>

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <deque>

#include "bootstrap/fd_message.h"
#include "common/error.h"
#include "system/deadline.h"

namespace mnnvl {
namespace {

constexpr char kDigits[] = "0123456789abcdef";

std::string random_token() {
  unsigned char bits[kTokenBytes / 2];
  if (getrandom(bits, sizeof(bits), 0) != static_cast<ssize_t>(sizeof(bits))) fail_errno(errno, "getrandom");
  std::string token;
  for (unsigned char b : bits) {
    token += kDigits[b >> 4];
    token += kDigits[b & 15];
  }
  return token;
}

// What a rank tells its group: the name of its socket, and the token that its messages carry. Everybody on the host can
// read the name.
struct Address {
  std::string name, token;

  static Address parse(const std::string& text, size_t rank) {
    if (text.size() != 2 * kTokenBytes || text.find_first_not_of(kDigits) != std::string::npos)
      fail(ErrorKind::kSystem, "what rank ", rank, " gave as its socket's address, ", text.size(), " bytes, is none");
    return {text.substr(0, kTokenBytes), text.substr(kTokenBytes)};
  }
};

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

bool too_many_files(int err) { return err == EMFILE || err == ENFILE; }

UniqueFd try_socket() { return UniqueFd(socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0)); }

UniqueFd open_socket() {
  UniqueFd fd = try_socket();
  if (!fd) fail_errno(errno, "socket for passing descriptors");
  return fd;
}

// Takes as long for a token that is nearly right as for any.
bool same_token(const std::string& one, const std::string& other) {
  unsigned char difference = one.size() != other.size();
  for (size_t i = 0; i < std::min(one.size(), other.size()); ++i) difference |= one[i] ^ other[i];
  return difference == 0;
}

bool same_user(int fd) {
  ucred credentials{};
  socklen_t length = sizeof(credentials);
  return getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &credentials, &length) == 0 && credentials.uid == geteuid();
}

// One rank's side of the exchange: one loop that accepts, reads, sends what can be sent, and waits. A rank never stops
// accepting while it waits to send: strangers may fill its queue of connections (abstract names can be read in /proc),
// and peers that wait for room in each other's queues would wait for ever. A turn's work is bounded, and so is the
// number of connections that say nothing. A peer whose connection was dropped before it could speak comes again.
class Session {
 public:
  Session(int rank, const std::vector<Address>& addresses, int listener, const Deadline& deadline)
      : rank_(rank),
        size_(static_cast<int>(addresses.size())),
        addresses_(addresses),
        listener_(listener),
        deadline_(deadline),
        peers_(size_) {
    peers_[rank].sent = peers_[rank].done = true;
  }

  std::vector<UniqueFd> run(int fd) {
    while (!complete()) {
      note_hang_ups();
      accept_some();
      read_all();
      look_at_hang_ups();
      const bool waits_for_room = !send_to_all(fd);
      if (complete()) break;
      if (deadline_.passed()) time_out();
      wait(waits_for_room);
    }
    std::vector<UniqueFd> fds;
    for (Peer& peer : peers_) fds.push_back(std::move(peer.received));
    return fds;
  }

 private:
  struct Peer {
    bool sent = false, done = false;  // what this rank sends it; what it sends this rank
    // Kept open until this rank ends, which is what the peer then sees of it; and the other way round.
    UniqueFd incoming, outgoing;
    UniqueFd received;
    int64_t hung_up_at = -1;          // accepted_ when its end was seen
  };

  bool complete() const {
    return std::all_of(peers_.begin(), peers_.end(), [](const Peer& peer) { return peer.sent && peer.done; });
  }

  std::string ranks_with(bool (*test)(const Peer&)) const {
    std::string ranks;
    for (int peer = 0; peer < size_; ++peer) {
      if (test(peers_[peer])) ranks += str(ranks.empty() ? "" : ", ", peer);
    }
    return ranks;
  }

  [[noreturn]] void time_out() const {
    const std::string silent = ranks_with([](const Peer& peer) { return !peer.done; });
    const std::string full = ranks_with([](const Peer& peer) { return !peer.sent; });
    std::string text;
    if (!silent.empty()) text += str("no descriptors from rank(s) ", silent);
    if (!full.empty()) text += str(text.empty() ? "" : ", and ", "no room in the queue of rank(s) ", full);
    fail(ErrorKind::kTimeout, text, " within ", deadline_.timeout_ms(), " ms");
  }

  // --- Sending.

  // False while the queue of some peer has no room.
  bool send_to_all(int fd) {
    bool all = true;
    for (int peer = 0; peer < size_; ++peer) {
      if (!peers_[peer].sent) all = send_to(peer, fd) && all;
    }
    return all;
  }

  bool send_to(int peer, int fd) {
    sockaddr_un address;
    const socklen_t length = make_address(addresses_[peer].name, &address);
    UniqueFd connection = try_socket();
    while (!connection && too_many_files(errno) && !incoming_.empty()) {
      drop_oldest();
      connection = try_socket();
    }
    if (!connection) fail_errno(errno, "socket for passing descriptors");
    int outcome;
    do {
      outcome = connect(connection.get(), reinterpret_cast<sockaddr*>(&address), length);
    } while (outcome != 0 && errno == EINTR);
    if (outcome != 0 && errno == EAGAIN) return false;
    if (outcome != 0 && errno == ECONNREFUSED) {
      fail(ErrorKind::kPeerFailed, "rank ", peer,
           "'s socket is gone: it failed first, or runs in another network namespace");
    }
    if (outcome != 0) fail_errno(errno, "connect to rank ", peer);
    if (!same_user(connection.get())) {
      fail(ErrorKind::kSystem, "rank ", peer, "'s socket belongs to another user (this rank's uid is ", geteuid(),
           "); descriptors are passed only between processes of one user");
    }
    if (!send_fd_message(connection.get(), peer, rank_, addresses_[rank_].token, fd)) return false;
    peers_[peer].outgoing = std::move(connection);
    peers_[peer].sent = true;
    return true;
  }

  // --- Receiving.

  void accept_some() {
    drained_ = false;
    for (int turn = 0; turn < kAcceptsPerTurn; ++turn) {
      UniqueFd connection(accept4(listener_, nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
      if (connection) {
        ++accepted_;
        if (same_user(connection.get())) incoming_.push_back(std::move(connection));
        if (incoming_.size() > kMostSilent) drop_oldest();
        continue;
      }
      drained_ = errno == EAGAIN;
      if (drained_) return;
      if (too_many_files(errno) && !incoming_.empty()) {
        drop_oldest();
        continue;
      }
      if (errno != EINTR && errno != ECONNABORTED) fail_errno(errno, "accept of a peer's descriptor");
    }
  }

  void read_all() {
    std::deque<UniqueFd> unread;
    for (UniqueFd& connection : incoming_) {
      if (!read(connection)) unread.push_back(std::move(connection));
    }
    incoming_ = std::move(unread);
  }

  // False while nothing has come.
  bool read(UniqueFd& connection) {
    FdMessage message;
    const Received received = receive_fd_message(
        connection.get(), [&](int rank, const auto& token) { return expects(rank, token); }, &message);
    if (received == Received::kMessage) take(std::move(message), std::move(connection));
    return received != Received::kNothingYet;
  }

  bool expects(int rank, const std::string& token) const {
    return rank >= 0 && rank < size_ && !peers_[rank].done && same_token(token, addresses_[rank].token);
  }

  // The one that has been silent longest. It can send no more before it is read for the last time, so that nothing that
  // a peer has sent is lost.
  void drop_oldest() {
    UniqueFd connection = std::move(incoming_.front());
    incoming_.pop_front();
    shutdown(connection.get(), SHUT_RD);
    read(connection);
  }

  void take(FdMessage message, UniqueFd connection) {
    const int rank = message.rank;
    if (message.has_fd && (message.fds.size() != 1 || message.truncated)) {
      fail(ErrorKind::kSystem, "rank ", rank,
           "'s descriptor was lost on the way: is this process at its limit of open files (ulimit -n)?");
    }
    if (message.has_fd) peers_[rank].received = std::move(message.fds[0]);
    peers_[rank].incoming = std::move(connection);
    peers_[rank].done = true;
  }

  // --- Peers that end.

  void note_hang_ups() {
    for (Peer& peer : peers_) {
      if (!peer.outgoing || peer.done || peer.hung_up_at >= 0) continue;
      pollfd fd{peer.outgoing.get(), 0, 0};
      if (poll(&fd, 1, 0) > 0 && (fd.revents & (POLLHUP | POLLERR)) != 0) peer.hung_up_at = accepted_;
    }
  }

  // A peer closes its end only after it has sent to all, or after it failed. So whoever hung up is judged when
  // everything was read that stood in the queue by then.
  void look_at_hang_ups() const {
    for (int rank = 0; rank < size_; ++rank) {
      const Peer& peer = peers_[rank];
      if (peer.done || peer.hung_up_at < 0) continue;
      if (drained_ || accepted_ - peer.hung_up_at > SOMAXCONN + 1) {
        fail(ErrorKind::kPeerFailed, "rank ", rank, " closed its socket before it had sent its descriptor");
      }
    }
  }

  // --- Waiting.

  // Nothing tells when a full queue has room again.
  void wait(bool waits_for_room) {
    std::vector<pollfd> fds{{listener_, POLLIN, 0}};
    for (const UniqueFd& fd : incoming_) fds.push_back({fd.get(), POLLIN, 0});
    for (const Peer& peer : peers_) {
      if (peer.outgoing && !peer.done) fds.push_back({peer.outgoing.get(), 0, 0});  // hang-ups only
    }
    if (poll(fds.data(), fds.size(), deadline_.left_ms(waits_for_room ? 1 : 1000)) < 0 && errno != EINTR)
      fail_errno(errno, "poll");
  }

  static constexpr int kAcceptsPerTurn = 1024;
  // A peer sends right after it connects. More would cost this process descriptors that it needs.
  static constexpr size_t kMostSilent = 16;

  const int rank_;
  const int size_;
  const std::vector<Address>& addresses_;
  const int listener_;
  const Deadline& deadline_;
  std::vector<Peer> peers_;         // by rank
  std::deque<UniqueFd> incoming_;   // accepted, nothing read
  int64_t accepted_ = 0;
  bool drained_ = false;            // the last turn's accepts left nothing in the queue
};

}  // namespace

FdChannel::FdChannel() : listener_(open_socket()), address_(random_token() + random_token()) {
  sockaddr_un address;
  socklen_t length = make_address(Address::parse(address_, 0).name, &address);
  if (bind(listener_.get(), reinterpret_cast<sockaddr*>(&address), length) != 0) {
    fail_errno(errno, "bind of the socket for passing descriptors");
  }
  // As many as the kernel allows: strangers may come before this rank begins to accept.
  if (listen(listener_.get(), SOMAXCONN) != 0) fail_errno(errno, "listen on the socket for passing descriptors");
}

std::vector<UniqueFd> FdChannel::exchange(int rank, const std::vector<std::string>& addresses, int fd,
                                          int64_t timeout_ms) {
  UniqueFd listener = std::move(listener_);
  MNNVL_ASSERT(listener && rank >= 0 && rank < static_cast<int>(addresses.size()),
               "FdChannel::exchange is called once, by a rank");
  std::vector<Address> parsed;
  for (const std::string& address : addresses) parsed.push_back(Address::parse(address, parsed.size()));
  Deadline deadline(timeout_ms);
  return Session(rank, parsed, listener.get(), deadline).run(fd);
}

}  // namespace mnnvl
