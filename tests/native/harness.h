// The harness of the native tests: TEST registers, CHECK throws, run_threads carries what a thread threw to the caller.
#pragma once

#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "common/error.h"

namespace mnnvl::test {

class Failure : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

struct Registration {
  Registration(const char* name, void (*body)());
};

// `wanted` iterations, fewer where the caller of the executable asked for less (--percent, for emulated machines); at
// least one.
int iterations(int wanted);

// Runs body(0) ... body(count - 1) on a thread each, waits for all, and rethrows what the lowest one threw.
inline void run_threads(int count, const std::function<void(int)>& body) {
  std::vector<std::exception_ptr> thrown(static_cast<size_t>(count));
  std::vector<std::thread> threads;
  for (int i = 0; i < count; ++i) {
    threads.emplace_back([&, i] {
      try {
        body(i);
      } catch (...) {
        thrown[static_cast<size_t>(i)] = std::current_exception();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const std::exception_ptr& error : thrown) {
    if (error) std::rethrow_exception(error);
  }
}

// What `body` throws as an Error; a Failure if it throws none.
inline Error error_of(const std::function<void()>& body) {
  try {
    body();
  } catch (const Error& error) {
    return error;
  }
  throw Failure("nothing was thrown");
}

// Numbers that look random and are the same everywhere: splitmix64.
inline uint64_t mix(uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

using Bytes = std::vector<std::byte>;

// Any bits at all, the same for the same seed.
inline Bytes any_bytes(uint64_t seed, int64_t bytes) {
  Bytes data(static_cast<size_t>(bytes));
  for (size_t i = 0; i < data.size(); ++i) data[i] = static_cast<std::byte>(mix(seed + i / 8) >> (i % 8 * 8));
  return data;
}

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t next() { return state_ = mix(state_); }
  int64_t below(int64_t end) { return static_cast<int64_t>(next() % static_cast<uint64_t>(end)); }

 private:
  uint64_t state_;
};

}  // namespace mnnvl::test

#define TEST(name) \
  static void name(); \
  static const ::mnnvl::test::Registration registration_of_##name(#name, name); \
  static void name()

// CHECK(condition, what, to, say...)
#define CHECK(condition, ...) \
  do { \
    if (!(condition)) \
      throw ::mnnvl::test::Failure(::mnnvl::str(__FILE__, ":", __LINE__, ": " #condition " ", ##__VA_ARGS__)); \
  } while (0)
