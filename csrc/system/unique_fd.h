// Owns one file descriptor.
#pragma once

#include <unistd.h>

#include <utility>

namespace mnnvl {

class UniqueFd {
 public:
  UniqueFd() = default;
  explicit UniqueFd(int fd) : fd_(fd) {}
  UniqueFd(UniqueFd&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  UniqueFd& operator=(UniqueFd&& other) noexcept {
    std::swap(fd_, other.fd_);
    return *this;
  }
  ~UniqueFd() {
    if (fd_ >= 0) ::close(fd_);
  }

  int get() const { return fd_; }
  explicit operator bool() const { return fd_ >= 0; }
  int release() { return std::exchange(fd_, -1); }  // to an owner that isn't a UniqueFd
  void reset() { UniqueFd(std::move(*this)); }

 private:
  int fd_ = -1;
};

}  // namespace mnnvl
