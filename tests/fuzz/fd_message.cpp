// One message on a socket, from anybody.
#include "bootstrap/fd_message.h"

#include <fcntl.h>
#include <sys/socket.h>

#include "fuzz/fuzz.h"
#include "fuzz/stranger.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace mnnvl;
  const int free_before = fuzz::lowest_free_descriptor();
  const std::string token(kTokenBytes, 'a');
  {
    fuzz::Input input(data, size);
    int pair[2];
    REQUIRE(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, pair) == 0);
    const UniqueFd here(pair[0]), there(pair[1]);
    const int descriptors = input.below(4);
    const bool closes = input.below(2) == 1;
    if (!closes || input.below(2) == 1)
      fuzz::send_as_stranger(there.get(), fuzz::stranger_message(input, token), descriptors);
    if (closes) shutdown(there.get(), SHUT_WR);

    FdMessage message;
    bool asked = false, ours = false;
    const int free_for_strangers = fuzz::lowest_free_descriptor();
    const Received received = receive_fd_message(
        here.get(),
        [&](int rank, const std::string& given) {
          REQUIRE(given.size() == kTokenBytes);
          asked = true;
          return ours = rank == 1 && given == token;
        },
        &message);
    REQUIRE((received == Received::kMessage) == (asked && ours));
    if (received == Received::kMessage) {
      REQUIRE(message.rank == 1);
      // As many as came, or a sign that some didn't fit.
      REQUIRE(static_cast<int>(message.fds.size()) == descriptors || message.truncated, message.fds.size());
      for (const UniqueFd& fd : message.fds) REQUIRE((fcntl(fd.get(), F_GETFD) & FD_CLOEXEC) != 0);
    } else {
      REQUIRE(message.fds.empty() && fuzz::lowest_free_descriptor() == free_for_strangers);
    }
  }
  REQUIRE(fuzz::lowest_free_descriptor() == free_before);
  return 0;
}
