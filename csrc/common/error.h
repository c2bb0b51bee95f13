// The one typed exception below the torch boundary. backend/ turns it into c10d's exception types.
#pragma once

#include <cstring>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>

namespace mnnvl {

enum class ErrorKind {
  kInvalidArgument,  // the caller's mistake, found before anything was enqueued: ValueError
  kUnsupported,      // this machine, build or operation can't: RuntimeError
  kSystem,           // a driver, library or operating-system call failed
  kTimeout,          // a deadline passed
  kPeerFailed,       // another rank died, aborted or failed first
  kAborted,          // abort() was called here
};

// Whether a failure is this rank's own: not another's, nor a deadline, which passes while others are waited for.
constexpr bool is_own(ErrorKind kind) { return kind != ErrorKind::kTimeout && kind != ErrorKind::kPeerFailed; }

class Error : public std::runtime_error {
 public:
  Error(ErrorKind kind, std::string what) : std::runtime_error(std::move(what)), kind_(kind) {}
  ErrorKind kind() const { return kind_; }

 private:
  ErrorKind kind_;
};

// Streams all arguments into one string: str("rank ", 3, " of ", 4).
template <typename... Args>
std::string str(const Args&... args) {
  std::ostringstream out;
  (out << ... << args);
  return out.str();
}

template <typename... Args>
[[noreturn]] void fail(ErrorKind kind, const Args&... args) {
  throw Error(kind, str(args...));
}

// fail() with the text of an errno value appended.
template <typename... Args>
[[noreturn]] void fail_errno(int err, const Args&... args) {
  throw Error(ErrorKind::kSystem, str(args..., ": ", std::strerror(err)));
}

}  // namespace mnnvl

// Internal invariants; a failure is a bug of this library.
#define MNNVL_ASSERT(cond, ...) \
  do { \
    if (!(cond)) ::mnnvl::fail(::mnnvl::ErrorKind::kSystem, "internal: " #cond ": ", __VA_ARGS__); \
  } while (0)
