// Two ranks pass descriptors while strangers of their own uid connect to both: whatever these send, the ranks get
// each other's, and nothing else.
#include "bootstrap/fd_channel.h"

#include <sys/mman.h>
#include <sys/un.h>

#include <cstddef>
#include <thread>

#include "bootstrap/fd_message.h"
#include "fuzz/fuzz.h"
#include "fuzz/stranger.h"

namespace mnnvl {
namespace {

UniqueFd connect_to(const std::string& name) {
  UniqueFd connection(socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  const std::string full = "mnnvl-" + name;
  std::memcpy(address.sun_path + 1, full.data(), full.size());
  const auto length = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + full.size());
  (void)!connect(connection.get(), reinterpret_cast<sockaddr*>(&address), length);
  return connection;
}

UniqueFd memory_of(int rank) {
  UniqueFd fd(memfd_create("mnnvl-fuzz", MFD_CLOEXEC));
  REQUIRE(ftruncate(fd.get(), 100 + rank) == 0);
  return fd;
}

void pass(FdChannel channel, const std::vector<std::string>& addresses, int rank) {
  const UniqueFd own = memory_of(rank);
  const std::vector<UniqueFd> fds = channel.exchange(rank, addresses, own.get(), /*timeout_ms=*/10000);
  REQUIRE(lseek(fds[1 - rank].get(), 0, SEEK_END) == 100 + 1 - rank);
}

void run(fuzz::Input& input) {
  FdChannel channels[2];
  const std::vector<std::string> addresses{channels[0].address(), channels[1].address()};
  std::vector<UniqueFd> kept;
  for (int count = input.below(16); count > 0; --count) {
    const int victim = input.below(2);
    const std::string name = addresses[victim].substr(0, kTokenBytes),
                      other = addresses[1 - victim].substr(0, kTokenBytes);
    UniqueFd connection = connect_to(name);
    const int how = input.below(5);  // names are what a stranger can know
    if (how > 0)
      fuzz::send_as_stranger(connection.get(), fuzz::stranger_message(input, how % 2 == 0 ? name : other), how % 4);
    if (input.below(2) == 0) kept.push_back(std::move(connection));
  }
  std::thread peer([&] { pass(std::move(channels[1]), addresses, 1); });
  pass(std::move(channels[0]), addresses, 0);
  peer.join();
}

}  // namespace
}  // namespace mnnvl

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const int free_before = mnnvl::fuzz::lowest_free_descriptor();
  mnnvl::fuzz::Input input(data, size);
  try {
    mnnvl::run(input);
  } catch (const mnnvl::Error& error) {
    REQUIRE(false, error.what());
  }
  REQUIRE(mnnvl::fuzz::lowest_free_descriptor() == free_before);
  return 0;
}
