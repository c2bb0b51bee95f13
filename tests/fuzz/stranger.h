// What a process outside the group can send to a rank's socket.
#pragma once

#include <fcntl.h>
#include <sys/socket.h>

#include <cstring>
#include <string>
#include <vector>

#include "fuzz/fuzz.h"
#include "system/unique_fd.h"

namespace mnnvl::fuzz {

// Bytes of the fuzzer's, or a message as ranks send them with some of them in the place of others.
inline std::string stranger_message(Input& input, const std::string& token) {
  const int form = input.below(4);
  if (form == 0) return input.chunk();
  std::string message = "mnnvlfd2";
  const int32_t rank = form == 1 ? 1 : input.below(8) - 2;
  const int32_t has_fd = input.below(3);
  message.append(reinterpret_cast<const char*>(&rank), sizeof(rank));
  message.append(reinterpret_cast<const char*>(&has_fd), sizeof(has_fd));
  message += token;
  if (form == 3 && input.below(2) == 0) return message.substr(0, input.byte() * message.size() / 256);
  if (form == 3) message[input.byte() % message.size()] = static_cast<char>(input.byte());
  return message + input.chunk();
}

// Never fails: what the kernel refuses, a stranger has tried.
inline void send_as_stranger(int connection, std::string bytes, int descriptors) {
  iovec data{bytes.data(), bytes.size()};
  alignas(cmsghdr) char control[CMSG_SPACE(16 * sizeof(int))] = {};
  msghdr header{};
  header.msg_iov = &data;
  header.msg_iovlen = 1;
  if (descriptors > 0) {
    header.msg_control = control;
    header.msg_controllen = CMSG_SPACE(static_cast<size_t>(descriptors) * sizeof(int));
    cmsghdr* rights = CMSG_FIRSTHDR(&header);
    rights->cmsg_level = SOL_SOCKET;
    rights->cmsg_type = SCM_RIGHTS;
    rights->cmsg_len = CMSG_LEN(static_cast<size_t>(descriptors) * sizeof(int));
    const std::vector<int> fds(static_cast<size_t>(descriptors), STDERR_FILENO);
    std::memcpy(CMSG_DATA(rights), fds.data(), fds.size() * sizeof(int));
  }
  (void)!sendmsg(connection, &header, MSG_NOSIGNAL | MSG_DONTWAIT);
}

}  // namespace mnnvl::fuzz
