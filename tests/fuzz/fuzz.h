// What the harnesses share: a fuzzer's bytes taken apart, and an Exchange whose peers say what they hold.
#pragma once

#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <utility>
#include <vector>

#include "bootstrap/exchange.h"
#include "bootstrap/record.h"
#include "common/error.h"

// Any compiler's; libFuzzer, and replay.cpp where it isn't, call it.
extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

// Ends the process as a crash does, which is what a fuzzer and the replay see.
#define REQUIRE(condition, ...) \
  do { \
    if (!(condition)) { \
      std::fprintf(stderr, "%s\n", ::mnnvl::str(__FILE__, ":", __LINE__, ": " #condition " ", ##__VA_ARGS__).c_str()); \
      std::abort(); \
    } \
  } while (0)

namespace mnnvl::fuzz {

class Input {
 public:
  Input(const uint8_t* data, size_t size) : data_(data), left_(size) {}

  bool empty() const { return left_ == 0; }
  uint8_t byte() { return left_ > 0 ? (--left_, *data_++) : 0; }
  int below(int end) { return byte() % end; }
  // As many bytes as the next two say, or as there are.
  std::string chunk() {
    const size_t low = byte(), wanted = byte() * size_t{256} + low;
    return take(std::min(wanted, left_));
  }
  std::string rest() { return take(left_); }

 private:
  std::string take(size_t size) {
    std::string bytes(reinterpret_cast<const char*>(data_), size);
    data_ += size;
    left_ -= size;
    return bytes;
  }

  const uint8_t* data_;
  size_t left_;
};

// Runs what parses; nothing but Error may come out, with a text that can be shown and that has an end.
template <typename F>
void only_errors(const F& body) {
  try {
    body();
  } catch (const Error& error) {
    const std::string text = error.what();
    REQUIRE(error.kind() >= ErrorKind::kInvalidArgument && error.kind() <= ErrorKind::kAborted);
    REQUIRE(text.size() < 4 * kMaxTextBytes, text.size());
    REQUIRE(text.size() > kMaxTextBytes || readable(text) == text, text);
    REQUIRE(text.rfind("internal: ", 0) != 0, text);
  }
}

// Rank 0 among hostile ranks.
class HostileExchange final : public Exchange {
 public:
  HostileExchange(Input& input, int size) : input_(input), size_(size) {}
  int rank() const override { return 0; }
  int size() const override { return size_; }
  std::vector<std::string> all_gather(const std::string& mine) override {
    std::vector<std::string> all{mine};
    while (static_cast<int>(all.size()) < size_) all.push_back(answer(mine));
    return all;
  }

 private:
  std::string answer(const std::string& mine) {
    switch (input_.below(4)) {
      case 0: return input_.chunk();
      // Of a rank that says it is well: what it says besides is then parsed.
      case 1: return RecordWriter().put(true).put(ErrorKind::kSystem).put(std::string()).put(input_.chunk()).bytes();
      case 2: return mine;  // replayed
      default: {
        std::string changed = mine;
        if (changed.empty()) return changed;
        const size_t at = input_.byte() * changed.size() / 256;
        changed[at] = static_cast<char>(input_.byte());
        return input_.below(2) == 0 ? changed : changed.substr(0, at);
      }
    }
  }

  Input& input_;
  const int size_;
};

// The lowest descriptor that is free: the same before and after, unless something has leaked.
inline int lowest_free_descriptor() {
  const int fd = dup(STDERR_FILENO);
  close(fd);
  return fd;
}

}  // namespace mnnvl::fuzz
